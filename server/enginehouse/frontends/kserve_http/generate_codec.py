"""The flat JSON of generate: keys that are inputs become tensors, all others parameters; and back.

Pure. A value is a scalar or a one-dimensional array; its shape is made to fit the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enginehouse.errors import InvalidArgument
from enginehouse.frontends.json_values import JsonTypeError, Members, about, as_string
from enginehouse.frontends.request_parameters import plain_parameter, request_text
from enginehouse.frontends.tensor_json import bytes_from_json, json_from_tensor
from enginehouse.types import DataType, InferRequest, InferResponse, Tensor, TensorSpec

NESTED = "parameters"
"""The one key whose members count as if they stood beside it."""


def decode_generate(request: InferRequest, document: Any, inputs: Mapping[str, TensorSpec]) -> None:
    """Fills the request from what `parse_json_members` gave. Raises with Triton's texts."""
    members = _members(document)
    for key, value in members:
        if key == "id":
            try:
                request.id = as_string(value)
            except JsonTypeError as error:
                raise about("Unable to parse 'id'", error) from None
            break
    for key, value in members:
        if key != NESTED:
            _decode_member(request, key, value, inputs)
        elif key in inputs:
            raise InvalidArgument(f"Keyword '{NESTED}' for nested schema also given as input tensor name")
        else:
            _decode_nested(request, value, inputs)


def _members(document: Any) -> Members:
    if isinstance(document, Members):
        return document
    raise JsonTypeError("attempt to get members for non-object")


def _decode_nested(request: InferRequest, value: Any, inputs: Mapping[str, TensorSpec]) -> None:
    if not isinstance(value, Members):
        raise JsonTypeError(
            f"Expected JSON object for keyword: '{NESTED}': attempt to access JSON non-object as object"
        )
    for key, member in value:
        try:
            _decode_member(request, key, member, inputs)
        except InvalidArgument as error:
            raise InvalidArgument(f"Converting keyword: '{NESTED}': {error}") from None
        except JsonTypeError as error:
            raise about(f"Converting keyword: '{NESTED}'", error) from None


def _decode_member(request: InferRequest, key: str, value: Any, inputs: Mapping[str, TensorSpec]) -> None:
    spec = inputs.get(key)
    if spec is None:
        request.parameters[key] = plain_parameter(key, value)
        return
    if key in request.inputs:
        raise InvalidArgument(f"{request_text(request.id)}input '{key}' already exists in request")
    values = value if isinstance(value, list) and not isinstance(value, Members) else [value]
    shape = _shape(spec, len(values))
    if spec.datatype in (DataType.FP16, DataType.BF16):
        raise InvalidArgument(
            f"receiving {spec.datatype.wire_name} data via JSON is not supported. Please use the binary data "
            f"format for input {key}"
        )
    try:
        data = bytes_from_json(values, spec.datatype, (len(values),))
    except JsonTypeError as error:
        raise about("Unable to parse 'data'", error) from None
    request.inputs[key] = Tensor(key, spec.datatype, shape, memoryview(data))


def _shape(spec: TensorSpec, num_elements: int) -> tuple[int, ...]:
    """Fixed sizes take their share of the elements, the last variable one what is left, others are 1."""
    left = num_elements
    for size in spec.dims:
        if size > 0:
            left, rest = divmod(left, size)
            if rest:
                raise _unfitting(spec)
        elif size == 0 and left:
            raise _unfitting(spec)
    shape = list(spec.dims)
    for axis in reversed(range(len(shape))):
        if shape[axis] < 0:
            shape[axis], left = left, 1
    if left > 1:
        raise _unfitting(spec)
    return tuple(shape)


def _unfitting(spec: TensorSpec) -> InvalidArgument:
    return InvalidArgument(f"The schema can not convert input '{spec.name}' to tensor with proper shape")


def encode_generate(response: InferResponse) -> dict[str, Any]:
    """The answer as one flat object, keys in order; outputs of one element are scalars.

    Raises InvalidArgument for types without a JSON form.
    """
    document: dict[str, Any] = {"id": response.id} if response.id else {}
    document["model_name"] = response.model_name
    document["model_version"] = response.model_version
    document.update(response.parameters)
    for tensor in response.outputs:
        values = json_from_tensor(tensor)
        document[tensor.name] = values[0] if len(values) == 1 else values
    return dict(sorted(document.items()))
