"""What the server and a worker say to each other: a length, then msgpack of one of these.

Tensors are never in a message: `block` names a block of the sender's slab, a TensorRef where in the block.
`freed` are blocks of the receiver's slab that the sender has done with. Sent once means sent: the channel
is a stream socket and neither loses nor reorders.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from enginehouse.errors import EnginehouseError, FailureReason, error_of
from enginehouse.types import DataType, GenerateRequest, TokenEvent

MAX_MESSAGE_BYTES = 1 << 30
LENGTH = struct.Struct("<I")
PROGRESS_BYTES = 4096
"""At the start of the worker's slab, one PROGRESS for each instance."""
PROGRESS = struct.Struct("<qq")
"""The id of the batch that the instance runs (0 when idle) and since when, CLOCK_MONOTONIC ns."""


Piece: TypeAlias = tuple[int, int, int]
"""The number of a tensor that the worker holds (or IN_BLOCK), offset, bytes."""
IN_BLOCK = 0


class TensorRef(msgspec.Struct, array_like=True):
    """`pieces`, where there are any, tell where the bytes are instead of `offset` and `nbytes`."""

    name: str
    datatype: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    pieces: tuple[Piece, ...] = ()


class ErrorRef(msgspec.Struct, array_like=True):
    code: str
    message: str
    reason: str | None = None

    @classmethod
    def of(cls, error: EnginehouseError) -> ErrorRef:
        return cls(error.code.value, error.message, error.reason.value if error.reason else None)

    def error(self) -> EnginehouseError:
        return error_of(self.code, self.message, FailureReason(self.reason) if self.reason else None)


class RequestRef(msgspec.Struct, array_like=True):
    """An InferRequest. `flags`: 1 sequence start, 2 sequence end."""

    id: str
    inputs: list[TensorRef]
    outputs: list[str]
    parameters: dict[str, bool | int | float | str]
    correlation_id: int | str = 0
    flags: int = 0
    priority: int = 0
    timeout_us: int = 0
    deadline_ns: int = 0
    tenant: str = ""
    batch_size: int = 0
    model_name: str = ""
    model_version: str = ""
    traceparent: str = ""
    max_ahead: int = 0


class ResponseRef(msgspec.Struct, array_like=True):
    """An InferResponse to the request at `index` of its batch (0 for a model's own request)."""

    index: int
    outputs: list[TensorRef]
    error: ErrorRef | None = None
    final: bool = True
    has_response: bool = True
    parameters: dict[str, bool | int | float | str] = {}
    model_name: str = ""
    model_version: str = ""
    reschedule: bool = False


class ModelSource(msgspec.Struct, array_like=True):
    """All that a worker needs to load a version. `config` is a serialized ModelConfig."""

    backend: str
    target: str
    config: bytes
    version: int
    model_directory: str
    backend_options: dict[str, str]


# --- server to worker


class Segment(msgspec.Struct, array_like=True, tag=1):
    """A new segment, its descriptor attached; of the server's slab or of the worker's own."""

    of_worker: bool
    nbytes: int


class NoSegment(msgspec.Struct, array_like=True, tag=2):
    reason: str


class CompleteConfig(msgspec.Struct, array_like=True, tag=3):
    call_id: int
    source: ModelSource


class Load(msgspec.Struct, array_like=True, tag=4):
    call_id: int
    model_id: int
    source: ModelSource


class Create(msgspec.Struct, array_like=True, tag=5):
    """Answered with the instance's kind. `slot` is the place of its progress words."""

    call_id: int
    model_id: int
    instance_id: int
    slot: int
    name: str
    device: str
    group: int
    cpu_cores: tuple[int, ...] = ()
    more_devices: tuple[str, ...] = ()


class Close(msgspec.Struct, array_like=True, tag=6):
    call_id: int
    instance_id: int


class Unload(msgspec.Struct, array_like=True, tag=7):
    call_id: int
    model_id: int


class Probe(msgspec.Struct, array_like=True, tag=8):
    call_id: int
    instance_id: int


class Execute(msgspec.Struct, array_like=True, tag=9):
    """`joined` for instances that take tensors, `requests` for those that take requests."""

    batch_id: int
    instance_id: int
    block: int
    block_nbytes: int
    joined: list[TensorRef]
    outputs: list[str]
    requests: list[RequestRef]
    freed: list[int]
    kept: list[str] = []
    """Outputs that the worker holds instead of sending them."""


class Cancel(msgspec.Struct, array_like=True, tag=10):
    batch_id: int
    index: int


class Freed(msgspec.Struct, array_like=True, tag=11):
    """Both ways."""

    freed: list[int]


class Answer(msgspec.Struct, array_like=True, tag=12):
    """To a Service call."""

    call_id: int
    value: Any = None
    error: ErrorRef | None = None


class InferAnswer(msgspec.Struct, array_like=True, tag=13):
    """One of the answers to an Infer."""

    call_id: int
    block: int
    block_nbytes: int
    response: ResponseRef
    freed: list[int]


class Generate(msgspec.Struct, array_like=True, tag=14):
    instance_id: int
    request: GenerateRequest


class CancelGenerate(msgspec.Struct, array_like=True, tag=15):
    instance_id: int
    request_id: str


class Trim(msgspec.Struct, array_like=True, tag=17):
    """Nothing has happened for a while: the worker's slab may give its pages back."""


class Taken(msgspec.Struct, array_like=True, tag=18):
    """So many answers of a request were dealt with, where it limits how far the model may be ahead."""

    batch_id: int
    index: int
    num_taken: int
    freed: list[int]


class Drop(msgspec.Struct, array_like=True, tag=19):
    """Held tensors that nobody needs any more."""

    numbers: list[int]


class Fetch(msgspec.Struct, array_like=True, tag=20):
    """Answered with the block that a copy of the piece is in."""

    call_id: int
    piece: Piece


class EngineMetrics(msgspec.Struct, array_like=True, tag=16):
    call_id: int
    instance_id: int


# --- worker to server


class Reply(msgspec.Struct, array_like=True, tag=30):
    """To a call. `value` is what the call says."""

    call_id: int
    value: Any = None
    error: ErrorRef | None = None


class Done(msgspec.Struct, array_like=True, tag=31):
    """The instance is free again: `joined` or `responses` are what is answered with that."""

    batch_id: int
    block: int
    block_nbytes: int
    joined: list[TensorRef]
    responses: list[ResponseRef]
    error: ErrorRef | None
    times: tuple[int, int, int, int]
    freed: list[int]


class Respond(msgspec.Struct, array_like=True, tag=32):
    """An answer before or after `Done`."""

    batch_id: int
    block: int
    block_nbytes: int
    response: ResponseRef
    freed: list[int]


class NeedSegment(msgspec.Struct, array_like=True, tag=33):
    nbytes: int


class Service(msgspec.Struct, array_like=True, tag=34):
    """A method of contract.ServerServices, asked by a model. Call 0 wants no answer."""

    call_id: int
    model_id: int
    method: str
    arguments: list[Any]


class Infer(msgspec.Struct, array_like=True, tag=35):
    """A model's own request (BLS). The parent is the request that it runs for, where it said so."""

    call_id: int
    model_id: int
    block: int
    block_nbytes: int
    request: RequestRef
    decoupled: bool
    parent_batch_id: int
    parent_index: int
    freed: list[int]


class CancelInfer(msgspec.Struct, array_like=True, tag=36):
    call_id: int


class Events(msgspec.Struct, array_like=True, tag=37):
    """What one step of an engine added, all sequences together."""

    instance_id: int
    events: list[TokenEvent]


class Refused(msgspec.Struct, array_like=True, tag=38):
    """An engine's `submit` raised."""

    instance_id: int
    request_id: str
    error: ErrorRef


ToWorker = (
    Segment | NoSegment | CompleteConfig | Load | Create | Close | Unload | Probe | Execute | Cancel | Freed
    | Answer | InferAnswer | Generate | CancelGenerate | EngineMetrics | Trim | Taken | Drop | Fetch
)  # fmt: skip
ToServer = Reply | Done | Respond | NeedSegment | Service | Infer | CancelInfer | Events | Refused | Freed


def _encode_special(value: Any) -> Any:
    if isinstance(value, EnginehouseError):
        return ErrorRef.of(value)
    if isinstance(value, DataType):
        return value.proto
    raise TypeError(f"{type(value).__name__} can't go over the channel")


def _decode_special(kind: type, value: Any) -> Any:
    if issubclass(kind, EnginehouseError):
        return msgspec.convert(value, ErrorRef).error()
    raise TypeError(f"{kind.__name__} can't come over the channel")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_special)


def encode(message: msgspec.Struct) -> bytes:
    """The message with its length before it."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def decoder_of(union: Any) -> Callable[[bytes | memoryview], Any]:
    return msgspec.msgpack.Decoder(union, dec_hook=_decode_special).decode


class FrameReader:
    """Cuts a stream into messages."""

    def __init__(self, union: Any) -> None:
        self._decode = decoder_of(union)
        self._rest = b""

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete now. Raises ValueError (or msgspec's) on garbage."""
        if self._rest:
            data = self._rest + data
        view, position, end = memoryview(data), 0, len(data)
        messages: list[Any] = []
        while end - position >= 4:
            (length,) = LENGTH.unpack_from(data, position)
            if length > MAX_MESSAGE_BYTES:
                raise ValueError(f"a message of {length} bytes")
            stop = position + 4 + length
            if stop > end:
                break
            messages.append(self._decode(view[position + 4 : stop]))
            position = stop
        self._rest = data[position:] if position < end else b""
        return messages
