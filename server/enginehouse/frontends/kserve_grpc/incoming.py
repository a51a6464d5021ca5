"""A ModelInferRequest as it came: raw tensors stay where they are, and what was read before is not read again.

protobuf would copy a raw tensor twice. So the bytes are split at the first raw tensor (field 7, which clients write
last), and only what stands before it is parsed; where that was the same in an earlier request, not even that. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from enginehouse.config.schema import ModelInferRequest
from enginehouse.errors import Internal
from enginehouse.frontends.output_options import OutputOption, OutputOptions
from enginehouse.types import DataType, InferRequest, Tensor

MAX_KNOWN_BYTES = 2048
_MAX_KNOWN = 1024
# Fields of the message, all length-delimited: number << 3 | 2.
_ID, _PARAMETERS, _RAW = 0x1A, 0x22, 0x3A
_BEFORE_RAW = frozenset((0x0A, 0x12, _ID, _PARAMETERS, 0x2A, 0x32))


@dataclass(frozen=True, slots=True)
class KnownRequest:
    """What a request said beside its id and its raw tensors: no parameters, no shared memory."""

    model_name: str
    model_version: str
    inputs: Sequence[tuple[str, DataType, tuple[int, ...]]]
    requested_outputs: Sequence[str]
    options: dict[str, OutputOption]
    """Shared by all requests that say the same."""

    def fill(self, request: InferRequest, options: OutputOptions, raw: Sequence[memoryview]) -> None:
        """`raw` has one for each input."""
        inputs = request.inputs
        for (name, datatype, shape), data in zip(self.inputs, raw, strict=True):
            inputs[name] = Tensor(name, datatype, shape, data)
        request.requested_outputs = self.requested_outputs
        options.by_name = self.options


_known: dict[bytes, KnownRequest] = {}


@dataclass(slots=True)
class Incoming:
    """`message` is None where `known` says all that it would."""

    model_name: str
    model_version: str
    id: str
    raw: Sequence[memoryview]
    message: ModelInferRequest | None
    known: KnownRequest | None
    key: bytes
    """Of what may be remembered; empty for what may not."""

    def remember(self, request: InferRequest, options: OutputOptions) -> None:
        """After `message` was read into request and options without a complaint."""
        if not self.key or options.leases or len(request.inputs) != len(self.raw):
            return
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        inputs = [(tensor.name, tensor.datatype, tensor.shape) for tensor in request.inputs.values()]
        _known[self.key] = KnownRequest(
            self.model_name, self.model_version, inputs, request.requested_outputs, options.by_name
        )


def read_request(data: bytes) -> Incoming:
    """Raises Internal, as clients of Triton see it, for bytes that are no message."""
    try:
        split = _split(data)
    except IndexError:  # a length runs past the end: protobuf says so
        split = None
    if split is None:
        message = parse_request(data)
        return _parsed(message, [memoryview(part) for part in message.raw_input_contents], b"")
    key, request_id, num_head_bytes, raw = split
    known = _known.get(key)
    if known is not None and len(known.inputs) == len(raw):
        return Incoming(known.model_name, known.model_version, request_id, raw, None, known, b"")
    return _parsed(parse_request(data[:num_head_bytes]), raw, key if len(key) <= MAX_KNOWN_BYTES else b"")


def parse_request(data: bytes) -> ModelInferRequest:
    try:
        return ModelInferRequest.FromString(data)
    except DecodeError:
        raise Internal("Unable to parse request") from None


def _parsed(message: ModelInferRequest, raw: Sequence[memoryview], key: bytes) -> Incoming:
    return Incoming(message.model_name, message.model_version, message.id, raw, message, None, key)


def _split(data: bytes) -> tuple[bytes, str, int, list[memoryview]] | None:
    """The head without its id, empty if there are parameters; the id; how long the head is; the raw tensors.

    None where fields are in another order, or are none of this message's. IndexError at an end too early.
    """
    position, end = 0, len(data)
    id_start = id_end = 0
    request_id, is_plain = "", True
    while position < end:
        tag = data[position]
        if tag == _RAW:
            break
        if tag not in _BEFORE_RAW:
            return None
        start, stop = _span(data, position + 1)
        if tag == _ID:
            if id_end:
                return None
            id_start, id_end = position, stop
            try:
                request_id = data[start:stop].decode()
            except UnicodeDecodeError:
                return None
        elif tag == _PARAMETERS:
            is_plain = False
        position = stop
    num_head_bytes = position
    view, raw = memoryview(data), []
    while position < end:
        if data[position] != _RAW:
            return None
        start, position = _span(data, position + 1)
        raw.append(view[start:position])
    if position != end:
        return None
    key = data[:id_start] + data[id_end:num_head_bytes] if is_plain else b""
    return key, request_id, num_head_bytes, raw


def _span(data: bytes, position: int) -> tuple[int, int]:
    """Start and end of what a length at `position` says follows."""
    size = data[position]
    position += 1
    if size > 0x7F:
        size &= 0x7F
        shift = 7
        while True:
            byte = data[position]
            position += 1
            size |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise IndexError
    if position + size > len(data):
        raise IndexError
    return position, position + size
