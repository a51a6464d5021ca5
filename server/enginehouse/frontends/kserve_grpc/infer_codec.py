"""ModelInferRequest → InferRequest, and answers → ModelInferResponse. Pure but for shared memory leases.

Raw output bytes are appended to the serialized rest of the message by hand: protobuf would copy them twice. What the
rest says is mostly what it said before, so its pieces are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from enginehouse.config.schema import InferParameter, ModelInferRequest, ModelInferResponse
from enginehouse.core import ServedVersion
from enginehouse.errors import InvalidArgument
from enginehouse.frontends.kserve_grpc.incoming import Incoming
from enginehouse.frontends.output_options import OutputOption, OutputOptions, classified, write_to_lease
from enginehouse.frontends.request_parameters import EMPTY_FINAL, RESERVED_PREFIX, request_text
from enginehouse.frontends.shared_memory.regions import Lease, Regions
from enginehouse.types import DataType, DeviceData, InferRequest, InferResponse, ParameterValue, Tensor
from enginehouse.types import encode_bytes_elements as encode_elements

MAX_MESSAGE_BYTES = 2**31 - 1
# Fields of ModelInferResponse, length-delimited.
_ID_TAG, _RAW_OUTPUT_TAG = b"\x1a", b"\x32"
_NO_BYTES = memoryview(b"")

# Typed contents: the field, the type it carries, and the narrower ones that share it.
_CONTENTS: tuple[tuple[str, DataType, tuple[DataType, ...]], ...] = (
    ("bool_contents", DataType.BOOL, ()),
    ("int_contents", DataType.INT32, (DataType.INT8, DataType.INT16)),
    ("int64_contents", DataType.INT64, ()),
    ("uint_contents", DataType.UINT32, (DataType.UINT8, DataType.UINT16)),
    ("uint64_contents", DataType.UINT64, ()),
    ("fp32_contents", DataType.FP32, ()),
    ("fp64_contents", DataType.FP64, ()),
    ("bytes_contents", DataType.BYTES, ()),
)


def decode_request(incoming: Incoming, request: InferRequest, options: OutputOptions, regions: Regions) -> bool:
    """Fills request and options; true if the client wants empty final answers.

    `options.leases` may hold leases even when this raises: release them.
    """
    if incoming.known is not None:
        request.id = incoming.id
        incoming.known.fill(request, options, incoming.raw)
        return False
    assert incoming.message is not None, "there is a message where nothing is known"
    empty_final = _decode_message(incoming.message, incoming.raw, request, options, regions)
    incoming.remember(request, options)
    return empty_final


def _decode_message(
    message: ModelInferRequest,
    raw_contents: Sequence[memoryview],
    request: InferRequest,
    options: OutputOptions,
    regions: Regions,
) -> bool:
    """`raw_contents` stand for the message's own."""
    request.id = message.id
    empty_final = _read_parameters(message.parameters, request) if message.parameters else False
    inputs = request.inputs
    _refuse_repeated(message)
    raw = iter(raw_contents)
    for entry in message.inputs:
        name = entry.name
        datatype = DataType.from_request(entry.datatype)
        if entry.parameters or entry.HasField("contents"):
            data = _input_data(entry, datatype, message, bool(raw_contents), options, regions)
        else:
            data = None
        if data is None:
            found = next(raw, None)
            if found is None:
                raise InvalidArgument(f"unable to find data for {_input_text(entry, message)} in request.")
            data = found
        inputs[name] = Tensor(name, datatype, tuple(entry.shape), data)
    if message.outputs:
        request.requested_outputs = [output.name for output in message.outputs]
        for output in message.outputs:
            options.by_name[output.name] = _decode_output(output, options, regions)
    return empty_final


def _input_data(
    entry: Any,
    datatype: DataType,
    message: ModelInferRequest,
    has_raw: bool,
    options: OutputOptions,
    regions: Regions,
) -> memoryview | DeviceData | None:
    """What the entry itself says where its data is; None if that is among the raw contents."""
    found = _range(entry)
    if found is not None:
        if entry.HasField("contents"):
            raise InvalidArgument(
                "unexpected 'content' provided when using shared memory for " + _input_text(entry, message)
            )
        lease = _lease(found, regions)
        options.leases.append(lease)
        return lease.view()
    if not entry.HasField("contents"):
        return None
    if has_raw:
        raise InvalidArgument(
            f"contents field must not be specified when using raw_input_contents for '{entry.name}' for model "
            f"'{message.model_name}'"
        )
    return memoryview(_typed_contents(entry, datatype, message))


def _input_text(entry: Any, message: ModelInferRequest) -> str:
    return f"input tensor '{entry.name}' for model '{message.model_name}'"


def _refuse_repeated(message: ModelInferRequest) -> None:
    seen = set()
    for entry in message.inputs:
        if entry.name in seen:
            raise InvalidArgument(f"{request_text(message.id)}input '{entry.name}' already exists in request")
        seen.add(entry.name)


def _typed_contents(entry: Any, datatype: DataType, message: ModelInferRequest) -> bytes:
    contents = entry.contents
    data = b""
    for field, carried, narrower in _CONTENTS:
        values = getattr(contents, field)
        if not values:
            continue
        if data:
            raise InvalidArgument(
                f"unexpected explicit tensor data for {_input_text(entry, message)}, binary data was already supplied."
            )
        if datatype is not carried and datatype not in narrower:
            raise InvalidArgument(
                f"unexpected explicit tensor data for {_input_text(entry, message)} of type "
                f"'{carried.wire_name}', expected datatype '{datatype.wire_name}'"
            )
        if datatype is DataType.BYTES:
            elements = np.empty(len(values), object)
            elements[:] = list(values)
            data = encode_elements(elements)
        else:
            data = np.array(values, carried.numpy).astype(datatype.numpy).tobytes()
    return data


def _read_parameters(parameters: Mapping[str, InferParameter], request: InferRequest) -> bool:
    empty_final = False
    for key, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        match key:
            case "sequence_id":
                _expect(key, kind, "int64_param", "string_param")
                request.correlation_id = value.int64_param if kind == "int64_param" else value.string_param
            case "sequence_start":
                _expect(key, kind, "bool_param")
                request.sequence_start = value.bool_param
            case "sequence_end":
                _expect(key, kind, "bool_param")
                request.sequence_end = value.bool_param
            case "priority":
                _expect(key, kind, "int64_param", "uint64_param")
                request.priority = value.int64_param if kind == "int64_param" else value.uint64_param
                if request.priority < 0:
                    raise InvalidArgument("invalid value for 'priority', expected value >= 0.")
            case "timeout":
                _expect(key, kind, "int64_param")
                request.timeout_us = value.int64_param
            case _ if key == EMPTY_FINAL:
                _expect(key, kind, "bool_param")
                empty_final = value.bool_param
            case _ if key.startswith(RESERVED_PREFIX):
                raise InvalidArgument(
                    "parameter keys starting with 'triton_' are reserved for Triton usage. Only the "
                    f"following keys starting with 'triton_' are allowed: {EMPTY_FINAL}"
                )
            case _:
                request.parameters[key] = _plain(key, kind, value)
    return empty_final


def _expect(key: str, kind: str | None, *allowed: str) -> None:
    if kind not in allowed:
        raise InvalidArgument(f"invalid value type for '{key}' parameter, expected {' or '.join(allowed)}.")


def _plain(key: str, kind: str | None, value: InferParameter) -> ParameterValue:
    match kind:
        case "string_param":
            return value.string_param
        case "int64_param":
            return value.int64_param
        case "bool_param":
            return value.bool_param
        case "double_param":
            return value.double_param
    raise InvalidArgument(
        f"invalid value type for '{key}' parameter, expected int64_param, bool_param, or string_param."
    )


def _decode_output(output: Any, options: OutputOptions, regions: Regions) -> OutputOption:
    option = OutputOption(binary=True)
    if not output.parameters:
        return option
    found = _range(output)
    if found is not None:
        option.lease = _lease(found, regions)
        options.leases.append(option.lease)
    if "classification" in output.parameters:
        value = output.parameters["classification"]
        if value.WhichOneof("parameter_choice") != "int64_param":
            raise InvalidArgument("invalid value type for 'classification' parameter, expected int64_param")
        if found is not None:
            raise InvalidArgument("output can't set both 'shared_memory_region' and 'classification'")
        if value.int64_param <= 0:
            raise InvalidArgument("invalid value for 'classification' parameter, expected >= 0")
        option.num_classes = value.int64_param
    return option


@dataclass(slots=True)
class _Range:
    """What a tensor's parameters say of shared memory."""

    name: str
    offset: int
    num_bytes: int


def _range(entry: Any) -> _Range | None:
    parameters = entry.parameters
    if "shared_memory_region" not in parameters:
        for key in ("shared_memory_offset", "shared_memory_byte_size"):
            if key in parameters:
                raise InvalidArgument(
                    f"'{key}' can not be specified without 'shared_memory_region' parameter for tensor '{entry.name}'"
                )
        return None

    def read(key: str, kind: str) -> Any:
        if parameters[key].WhichOneof("parameter_choice") != kind:
            raise InvalidArgument(
                f"invalid value type for '{key}' parameter for tensor '{entry.name}', expected {kind}."
            )
        return getattr(parameters[key], kind)

    name = read("shared_memory_region", "string_param")
    offset = read("shared_memory_offset", "int64_param") if "shared_memory_offset" in parameters else 0
    if "shared_memory_byte_size" not in parameters:
        raise InvalidArgument(
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor "
            f"'{entry.name}'"
        )
    return _Range(name, offset, read("shared_memory_byte_size", "int64_param"))


def _lease(found: _Range, regions: Regions) -> Lease:
    if found.offset < 0:
        raise InvalidArgument(f"Invalid offset for shared memory region: '{found.name}'")
    if found.num_bytes < 0:
        raise InvalidArgument(f"Invalid offset + byte size for shared memory region: '{found.name}'")
    return regions.lease(found.name, found.offset, found.num_bytes)


def encode_parameters(parameters: Mapping[str, ParameterValue], into: Any) -> None:
    for key, value in parameters.items():
        entry = into[key]
        if isinstance(value, bool):
            entry.bool_param = value
        elif isinstance(value, int):
            entry.int64_param = value
        elif isinstance(value, float):
            entry.double_param = value
        else:
            entry.string_param = value


@lru_cache(4096)
def _names(model_name: str, model_version: str) -> bytes:
    return _serialized(ModelInferResponse(model_name=model_name, model_version=model_version))


@lru_cache(4096)
def _output(name: str, datatype: DataType, shape: tuple[int, ...]) -> bytes:
    message = ModelInferResponse()
    message.outputs.add(name=name, datatype=datatype.wire_name, shape=shape)
    return _serialized(message)


def _serialized(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def response_parts(
    response: InferResponse,
    options: OutputOptions,
    served: ServedVersion,
    parameters: Mapping[str, ParameterValue],
) -> list[bytes | memoryview]:
    """A serialized ModelInferResponse in pieces: serialized fields can be joined in any number and order.

    Raises InvalidArgument or Internal for an output that can't take the form it was asked for in.
    """
    parts: list[bytes | memoryview] = [_names(response.model_name, response.model_version)]
    if response.id:
        text = response.id.encode()
        parts += (_ID_TAG, encode_varint(len(text)), text)
    if parameters:
        message = ModelInferResponse()
        encode_parameters(parameters, message.parameters)
        parts.append(_serialized(message))
    raw: list[bytes | memoryview] = []
    for tensor in response.outputs:
        option = options.of(tensor.name)
        if option.num_classes:
            tensor = classified(tensor, option, served)
        parts.append(_output(tensor.name, tensor.datatype, tuple(tensor.shape)))
        data = _NO_BYTES
        if option.lease is not None:
            write_to_lease(tensor, option.lease)
        else:
            data = tensor.host_data()
        raw += (_RAW_OUTPUT_TAG, encode_varint(data.nbytes), data)
    parts += raw
    return parts


@lru_cache(1024)
def encode_varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def encode_response(response: InferResponse, options: OutputOptions, served: ServedVersion) -> bytes:
    """A serialized ModelInferResponse."""
    answer = b"".join(response_parts(response, options, served, response.parameters))
    if len(answer) > MAX_MESSAGE_BYTES:
        raise InvalidArgument(
            f"Response has byte size {len(answer)} which exceeds gRPC's byte size limit {MAX_MESSAGE_BYTES}."
        )
    return answer
