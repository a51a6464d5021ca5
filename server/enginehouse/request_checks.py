"""Is this request one that the model can take? Checked once, at the border; pure.

Follows the order of Triton's own checks, because the first complaint is the one that clients see: it goes
through inputs from the last to the first, and through outputs by name. The work
that does not depend on the request is done when the version is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from enginehouse.config.schema import ModelConfig, ModelInput
from enginehouse.errors import EnginehouseError, FailureReason, InvalidArgument
from enginehouse.types import DataType, InferRequest, InferResponse, ResponseSink, Tensor

_BATCH_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended "
    "to each input shape. If you want to specify the full shape including the batch dim in your input dims "
    "config, try setting max_batch_size to zero. See the model configuration docs for more info on "
    "max_batch_size."
)


def of_request(request: InferRequest, message: str) -> str:
    """The text with the request's id before it: how the core speaks of a request."""
    return f"[request id: {request.id or '<id_unknown>'}] {message}"


@dataclass(frozen=True, slots=True)
class _InputRule:
    datatype: DataType
    dims: tuple[int, ...]
    model_dims: tuple[int, ...] | None
    """What `reshape` says the model itself sees."""
    is_shape_tensor: bool


class RequestChecks:
    """The checks of one config. `check` also sets `batch_size` and brings reshaped inputs to their shape."""

    def __init__(self, config: ModelConfig) -> None:
        self._name = config.name
        self._max_batch_size = config.max_batch_size
        self._rules = {spec.name: _rule(spec) for spec in config.input}
        self._required = [spec.name for spec in config.input if not spec.optional]
        self._outputs = {spec.name for spec in config.output}
        self._output_shapes = {
            spec.name: (tuple(spec.reshape.shape), tuple(spec.dims))
            for spec in config.output
            if spec.HasField("reshape")
        }
        self._reshaped = any(rule.model_dims is not None for rule in self._rules.values())

    def check(self, request: InferRequest) -> None:
        """Raises InvalidArgument with Triton's text."""
        for output in sorted(request.requested_outputs):
            if output not in self._outputs:
                raise InvalidArgument(f"unexpected inference output '{output}' for model '{self._name}'")
        inputs = request.inputs
        if len(inputs) != len(self._rules) or len(self._required) != len(self._rules):
            self._check_count(request)
        for name in inputs:
            if name not in self._rules:
                raise InvalidArgument(f"unexpected inference input '{name}' for model '{self._name}'")
        self._check_batch(request)
        for name in reversed(inputs):
            self._check_input(request, name, inputs[name], self._rules[name])
        if self._reshaped:
            request.inputs = {name: self._reshape(tensor, request) for name, tensor in inputs.items()}

    @property
    def reshapes_outputs(self) -> bool:
        return bool(self._output_shapes)

    def reshaping_sink(self, sink: ResponseSink) -> ResponseSink:
        """A sink that gives outputs the shape that clients were promised instead of the model's own."""

        def reshape(response: InferResponse) -> None:
            response.outputs = [self._promised(tensor) for tensor in response.outputs]
            sink(response)

        return reshape

    def _promised(self, tensor: Tensor) -> Tensor:
        found = self._output_shapes.get(tensor.name)
        if found is None:
            return tensor
        model_dims, dims = found
        batch = tensor.shape[:1] if self._max_batch_size > 0 else ()
        given = tensor.shape[len(batch) :]
        if len(given) != len(model_dims):
            return tensor  # not the declared shape: passes through, as any wrong shape does
        return Tensor(tensor.name, tensor.datatype, batch + reshaped(given, model_dims, dims), tensor.data)

    def _check_count(self, request: InferRequest) -> None:
        given, most, least = len(request.inputs), len(self._rules), len(self._required)
        missing = [name for name in self._required if name not in request.inputs]
        has_stranger = any(name not in self._rules for name in request.inputs)
        if least <= given <= most and (not missing or has_stranger):
            return  # a wrong name in the right number is complained of by that name
        expected = f"{most} inputs" if least == most else f"number of inputs between {least} and {most}"
        raise InvalidArgument(
            of_request(
                request,
                f"expected {expected} but got {given} inputs for model '{self._name}'. Got input(s) "
                f"{_listed(reversed(request.inputs), opening=True)}, but missing required input(s) "
                f"{_listed(missing)}. Please provide all required input(s).",
            )
        )

    def _check_batch(self, request: InferRequest) -> None:
        request.batch_size = 0
        if self._max_batch_size == 0:
            return
        batch_size = 0
        for name in reversed(request.inputs):
            if self._rules[name].is_shape_tensor:
                continue
            shape = request.inputs[name].shape
            if not shape:
                self._refuse(request, f"input '{name}' has no shape but model requires batch dimension for ")
            if batch_size == 0:
                batch_size = shape[0]
            elif shape[0] != batch_size:
                self._refuse(request, f"input '{name}' batch size does not match other inputs for ")
        if batch_size > self._max_batch_size:
            self._refuse(request, f"inference request batch-size must be <= {self._max_batch_size} for ")
        request.batch_size = batch_size

    def _refuse(self, request: InferRequest, complaint: str) -> None:
        raise InvalidArgument(of_request(request, f"{complaint}'{self._name}'"))

    def _check_input(self, request: InferRequest, name: str, tensor: Tensor, rule: _InputRule) -> None:
        if tensor.datatype is not rule.datatype:
            raise InvalidArgument(
                of_request(
                    request,
                    f"inference input '{name}' data-type is '{tensor.datatype.wire_name}', but model "
                    f"'{self._name}' expects '{rule.datatype.wire_name}'",
                )
            )
        batched = self._max_batch_size > 0 and not rule.is_shape_tensor
        shape = tensor.shape[1:] if batched else tensor.shape
        fits = _fits(rule.dims, shape)
        if min(tensor.shape if fits else shape, default=0) < 0:
            raise InvalidArgument(
                of_request(
                    request,
                    f"All input dimensions should be specified for input '{name}' for model '{self._name}', "
                    f"got {_dims(tensor.shape)}",
                )
            )
        if not fits:
            expected = (-1, *rule.dims) if batched else rule.dims
            raise InvalidArgument(
                of_request(
                    request,
                    f"unexpected shape for input '{name}' for model '{self._name}'. Expected "
                    f"{_dims(expected)}, got {_dims(tensor.shape)}. {_BATCH_NOTE if batched else ''}",
                )
            )
        rows = request.batch_size or 1 if batched else 1
        self._check_bytes(request, name, tensor, rows * math.prod(shape))
        if batched and request.batch_size == 0:
            # Triton lets it pass, as one row. Beside others in a batch its shape would not hold its bytes.
            self._refuse(request, "inference request batch-size must be >= 1 for ")

    def _check_bytes(self, request: InferRequest, name: str, tensor: Tensor, num_elements: int) -> None:
        if tensor.datatype is DataType.BYTES:
            if isinstance(tensor.data, memoryview):
                check_string_elements(request, name, tensor.data, num_elements, self._name)
            return
        expected = num_elements * tensor.datatype.item_size
        if tensor.nbytes != expected:
            raise InvalidArgument(
                of_request(
                    request,
                    f"input byte size mismatch for input '{name}' for model '{self._name}'. Expected {expected}, "
                    f"got {tensor.nbytes}",
                )
            )

    def _reshape(self, tensor: Tensor, request: InferRequest) -> Tensor:
        rule = self._rules[tensor.name]
        if rule.model_dims is None:
            return tensor
        batch = tensor.shape[:1] if self._max_batch_size > 0 else ()
        given = tensor.shape[len(batch) :]
        shape = batch + reshaped(given, rule.dims, rule.model_dims)
        return Tensor(tensor.name, tensor.datatype, shape, tensor.data)


def reshaped(shape: tuple[int, ...], dims: Iterable[int], target: Iterable[int]) -> tuple[int, ...]:
    """`target` with its -1s taken, in order, from where `dims` has a variable size."""
    variable = [size for size, dim in zip(shape, dims, strict=True) if dim < 0]
    taken = iter(variable)
    return tuple(next(taken) if dim < 0 else dim for dim in target)


def check_string_elements(request: InferRequest, name: str, data: memoryview, num_elements: int, model: str) -> None:
    """Raises InvalidArgument unless `data` holds exactly that many length-prefixed elements."""
    offset, end, found, cut_off = 0, data.nbytes, 0, None
    while offset < end:
        if end - offset < 4:
            raise InvalidArgument(
                of_request(
                    request,
                    f"incomplete string length indicator for inference input '{name}' for model '{model}', "
                    f"expecting 4 bytes but only {end - offset} bytes available. Please make sure the string "
                    "length indicator is in one buffer.",
                )
            )
        if found == num_elements:
            raise InvalidArgument(
                of_request(
                    request,
                    f"unexpected number of string elements {found + 1} for inference input '{name}' for model "
                    f"'{model}', expecting {num_elements}",
                )
            )
        length = int.from_bytes(data[offset : offset + 4], "little")
        offset += 4
        found += 1
        if length > end - offset:
            cut_off = (length, end - offset)
        offset += length
    if found != num_elements:
        raise InvalidArgument(
            of_request(
                request,
                f"expected {num_elements} string elements for inference input '{name}' for model '{model}', got "
                f"{found}",
            )
        )
    if cut_off is not None:
        raise InvalidArgument(
            f"incomplete string data for inference input '{name}', expecting string of length {cut_off[0]} but "
            f"only {cut_off[1]} bytes available",
            reason=FailureReason.BACKEND,  # Triton's backends find this; clients see where
        )


def prefixed(request: InferRequest, error: EnginehouseError) -> EnginehouseError:
    """The error as the core tells it, with the request's id."""
    return type(error)(of_request(request, error.message), reason=error.reason)


def _rule(spec: ModelInput) -> _InputRule:
    return _InputRule(
        DataType.from_proto(spec.data_type),
        tuple(spec.dims),
        tuple(spec.reshape.shape) if spec.HasField("reshape") else None,
        spec.is_shape_tensor,
    )


def _fits(dims: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(dims) == len(shape) and all(dim in (-1, size) for dim, size in zip(dims, shape, strict=True))


def _dims(dims: Iterable[int]) -> str:
    return f"[{','.join(map(str, dims))}]"


def _listed(names: Iterable[str], opening: bool = False) -> str:
    """Triton's list: "['A','B']"; an empty one loses its opening bracket unless it is the given inputs."""
    quoted = ",".join(f"'{name}'" for name in names)
    return f"[{quoted}]" if quoted or opening else "]"
