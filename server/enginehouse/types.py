"""The vocabulary: tensors, requests and answers as every layer sees them.

A tensor's bytes are in the wire's layout from the socket to the model (little-endian, C order; BYTES
elements behind a 4-byte length), so joining and splitting requests along the batch axis is joining and
splitting bytes. No I/O, clock or framework here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from enginehouse.errors import EnginehouseError, InvalidArgument

Array: TypeAlias = npt.NDArray[Any]
ParameterValue: TypeAlias = bool | int | float | str
CorrelationId: TypeAlias = int | str


class DataType(Enum):
    """Names as on the wire; `proto` is the number of ModelConfig's DataType; BYTES has no item size.

    BF16 has no numpy type: its arrays are uint16 holding the raw bits. INVALID is only in requests that name
    a type there is none of, until the core refuses them.
    """

    INVALID = ("<invalid>", 0, "V0")

    BOOL = ("BOOL", 1, "?")
    UINT8 = ("UINT8", 2, "u1")
    UINT16 = ("UINT16", 3, "<u2")
    UINT32 = ("UINT32", 4, "<u4")
    UINT64 = ("UINT64", 5, "<u8")
    INT8 = ("INT8", 6, "i1")
    INT16 = ("INT16", 7, "<i2")
    INT32 = ("INT32", 8, "<i4")
    INT64 = ("INT64", 9, "<i8")
    FP16 = ("FP16", 10, "<f2")
    FP32 = ("FP32", 11, "<f4")
    FP64 = ("FP64", 12, "<f8")
    BYTES = ("BYTES", 13, "O")
    BF16 = ("BF16", 14, "<u2")

    def __init__(self, wire_name: str, proto: int, numpy_code: str) -> None:
        self.wire_name = wire_name
        self.proto = proto
        self.numpy = np.dtype(numpy_code)
        self.item_size = 0 if wire_name == "BYTES" else self.numpy.itemsize

    @property
    def config_name(self) -> str:
        """As config files spell it: TYPE_FP32, TYPE_STRING."""
        return "TYPE_STRING" if self is DataType.BYTES else f"TYPE_{self.wire_name}"

    @classmethod
    def from_wire(cls, name: str) -> DataType:
        """Raises KeyError for a name that the protocol doesn't have."""
        return _BY_WIRE_NAME[name]

    @classmethod
    def from_request(cls, name: str) -> DataType:
        """INVALID for a name that the protocol doesn't have."""
        return _BY_WIRE_NAME.get(name, cls.INVALID)

    @classmethod
    def from_proto(cls, number: int) -> DataType:
        """Raises KeyError for TYPE_INVALID (0) and unknown numbers."""
        return _BY_PROTO[number]

    @classmethod
    def from_numpy(cls, dtype: npt.DTypeLike) -> DataType:
        """Object, `S` and `U` arrays are BYTES. Raises KeyError for types that the protocol lacks."""
        kind = np.dtype(dtype)
        return DataType.BYTES if kind.kind in "OSU" else _BY_NUMPY[kind]


VALID_TYPES = tuple(member for member in DataType if member is not DataType.INVALID)
_BY_WIRE_NAME = {member.wire_name: member for member in VALID_TYPES}
_BY_PROTO = {member.proto: member for member in VALID_TYPES}
_BY_NUMPY = {member.numpy: member for member in VALID_TYPES if member not in (DataType.BF16, DataType.BYTES)}


@dataclass(slots=True)
class Tensor:
    """A named tensor. `data` is a C-contiguous buffer in wire layout, or an object on a device.

    Views are fine and usual: `data` may point into a request's body, a slab or shared memory. Whoever
    holds a Tensor holds its memory. Nobody writes into a tensor after it is made.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    data: memoryview | DeviceData

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def numpy(self) -> Array:
        """The values: a read-only view for fixed-size types, an object array of bytes for BYTES.

        Raises InvalidArgument if the bytes don't fill the shape.
        """
        data = self.host_data()
        if self.datatype is DataType.BYTES:
            return decode_bytes_elements(data, self.name).reshape(self.shape)
        array = np.frombuffer(data, dtype=self.datatype.numpy)
        if array.size != self.num_elements:
            raise InvalidArgument(
                f"tensor '{self.name}' has {array.size} elements, its shape {list(self.shape)} needs "
                f"{self.num_elements}"
            )
        return array.reshape(self.shape)

    def host_data(self) -> memoryview:
        """The bytes in host memory; copies them there if they are on a device."""
        return self.data if isinstance(self.data, memoryview) else self.data.to_host()

    @classmethod
    def from_numpy(cls, name: str, array: Array, datatype: DataType | None = None) -> Tensor:
        """Views the array's memory where it is contiguous, else copies. Name BF16 for raw uint16 bits."""
        kind = datatype or DataType.from_numpy(array.dtype)
        if kind is DataType.BYTES:
            return cls(name, kind, array.shape, memoryview(encode_bytes_elements(array)))
        contiguous = np.ascontiguousarray(array, dtype=kind.numpy)
        # reshape(-1): memoryview.cast refuses shapes with a zero in them
        return cls(name, kind, array.shape, memoryview(contiguous.reshape(-1).view(np.uint8).data))


class DeviceData:
    """Memory of a tensor that is not in this process's host memory (subclasses: cuda, simulated)."""

    nbytes: int
    device: str

    def to_host(self) -> memoryview:
        raise NotImplementedError

    def joined(self, parts: Sequence[memoryview | DeviceData]) -> DeviceData | None:
        """The parts (the first is this one) one after the other on this device; None if it can't do that, and
        they are joined in host memory."""
        return None

    def part(self, offset: int, nbytes: int) -> DeviceData:
        """A range of it, as a view."""
        return self if nbytes == self.nbytes else DevicePart(self, offset, nbytes)


class DevicePart(DeviceData):
    """A range of other device memory; it has a `pointer` where the whole has one."""

    def __init__(self, whole: DeviceData, offset: int, nbytes: int) -> None:
        self.whole = whole
        self.offset = offset
        self.nbytes = nbytes
        self.device = whole.device
        pointer = getattr(whole, "pointer", None)
        if pointer is not None:
            self.pointer = pointer + offset

    def to_host(self) -> memoryview:
        return self.whole.to_host()[self.offset : self.offset + self.nbytes]

    def joined(self, parts: Sequence[memoryview | DeviceData]) -> DeviceData | None:
        return self.whole.joined(parts)

    def part(self, offset: int, nbytes: int) -> DeviceData:
        return self.whole.part(self.offset + offset, nbytes)


_LENGTH = struct.Struct("<I")


def encode_bytes_elements(array: Array) -> bytes:
    """BYTES elements in wire layout, C order. str elements are encoded as UTF-8."""
    parts: list[bytes] = []
    for element in array.reshape(-1).tolist():
        raw = element if isinstance(element, bytes) else str(element).encode()
        parts.append(_LENGTH.pack(len(raw)))
        parts.append(raw)
    return b"".join(parts)


def decode_bytes_elements(data: memoryview, name: str = "") -> Array:
    """A flat object array of `bytes`. Raises InvalidArgument if a length runs past the end."""
    elements: list[bytes] = []
    offset, end = 0, data.nbytes
    while offset < end:
        stop = offset + 4
        if stop > end:
            raise InvalidArgument(f"tensor '{name}' ends inside the length of string element {len(elements)}")
        start, stop = stop, stop + _LENGTH.unpack_from(data, offset)[0]
        if stop > end:
            raise InvalidArgument(f"tensor '{name}' ends inside string element {len(elements)}")
        elements.append(bytes(data[start:stop]))
        offset = stop
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model says of one input or output. `dims` includes the batch axis; -1 is any size."""

    name: str
    datatype: DataType
    dims: tuple[int, ...]
    optional: bool = False


@dataclass(slots=True)
class RequestTimes:
    """CLOCK_MONOTONIC nanoseconds, 0 while it has not happened; comparable between processes.

    Set by: received, the front end · queued, core · started, the scheduler as it hands the batch over ·
    compute_*, ended, the host as the batch ends, before it answers (a model that answers earlier: after).
    """

    received_ns: int = 0
    queued_ns: int = 0
    started_ns: int = 0
    compute_input_end_ns: int = 0
    compute_output_start_ns: int = 0
    ended_ns: int = 0


@dataclass(slots=True)
class InferResponse:
    """One answer to a request. `final` is true exactly once a request; after it nothing follows.

    An empty final (no outputs, no error) closes a decoupled exchange. `outputs` keep the model's order.
    """

    outputs: Sequence[Tensor] = ()
    error: EnginehouseError | None = None
    final: bool = True
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    model_name: str = ""
    model_version: str = ""
    id: str = ""
    has_response: bool = True
    """False for a bare final flag: the exchange ends and there is no answer to show."""
    reschedule: bool = False
    """From an instance instead of its final answer: iterative sequences want the request once more. Goes no
    further than execution."""


ResponseSink: TypeAlias = Callable[[InferResponse], None]


@dataclass(slots=True, eq=False)
class InferRequest:
    """One inference as the core sees it. `sink` is called on the server's loop, never before `submit`
    returns, and gets exactly one response with `final` set. After an error raised by `submit`, never.

    The front end sets the first block; core and scheduler own the second from `submit` on.
    """

    model_name: str
    model_version: str = ""
    """"" asks for the version that the policy makes the default."""
    id: str = ""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    requested_outputs: Sequence[str] = ()
    """Empty asks for all."""
    parameters: dict[str, ParameterValue] = field(default_factory=dict)
    correlation_id: CorrelationId = 0
    sequence_start: bool = False
    sequence_end: bool = False
    priority: int = 0
    timeout_us: int = 0
    deadline_ns: int = 0
    """Monotonic; 0 is none. Passed by gRPC deadlines and by callers in BLS and ensembles."""
    tenant: str = ""
    trace: Any = None
    """observe.tracing.Span of this request, or None."""
    sink: ResponseSink | None = None

    batch_size: int = 0
    """Rows along the batch axis; 0 for a model without one. Set by core's checks."""
    times: RequestTimes = field(default_factory=RequestTimes)
    cancelled: bool = False
    on_cancel: Callable[[InferRequest], None] | None = None
    """Set by whichever stage holds the request now; called once, on the loop, by `cancel`."""
    num_responses: int = 0
    failed: bool = False
    """Set by statistics when the request's end counts as its failure, so that it is not a success too."""
    flow: Any = None
    """Whatever the scheduler that holds the request needs to remember about it."""
    max_ahead: int = 0
    """How many answers before the final one the model may be ahead of whoever reads them; 0 is any number.
    A sender that sets it calls `took_answer` for each, and the model's next answer waits for that."""
    num_taken: int = 0
    on_taken: Callable[[InferRequest], None] | None = None
    """Set by the stage that makes the answers."""
    kept_outputs: frozenset[str] = frozenset()
    """Outputs that may stay in the process of the model, because whoever reads them lives there too."""

    def took_answer(self) -> None:
        """One more answer is dealt with. Nothing happens where nobody limits how far the model may be ahead."""
        self.num_taken += 1
        if self.on_taken is not None:
            self.on_taken(self)

    def cancel(self) -> None:
        """Asks the stage that holds the request to give it up. May be called at any time, and again."""
        if self.cancelled:
            return
        self.cancelled = True
        if self.on_cancel is not None:
            self.on_cancel(self)

    @property
    def num_rows(self) -> int:
        """What the request counts for in a batch: at least one."""
        return self.batch_size or 1


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How tokens are chosen. Defaults are those of the OpenAI API and vLLM."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 considers all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many alternatives to report a token; None reports nothing, 0 the sampled one alone."""
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation that the engine renders with the model's chat template and then tokenizes.

    Messages are OpenAI's, as parsed JSON; "content" may be text, None or a list of parts.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str = ""
    """"" is the model's own."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


class GenerateTask(Enum):
    """What is wanted. TOKENIZE and DETOKENIZE answer with one event and never reach the scheduler."""

    GENERATE = "generate"
    TOKENIZE = "tokenize"
    """`prompt_token_ids`, `prompt_text` (after the chat template) and `num_prompt_tokens`."""
    DETOKENIZE = "detokenize"
    """`text` of a prompt of token ids."""
    EMBED = "embed"
    """`embedding` of a prompt, in the one event that answers."""


@dataclass(slots=True, eq=False)
class GenerateRequest:
    """One sequence to generate (n > 1 is n of these that share a prompt)."""

    model_name: str
    id: str
    prompt: str | Sequence[int] | ChatPrompt
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    task: GenerateTask = GenerateTask.GENERATE
    stream: bool = True
    """False asks for one event at the end instead of one a step."""
    return_prompt: bool = False
    """Fill `prompt_token_ids` and `prompt_text` of the first event."""
    truncate_prompt_tokens: int | None = None
    """Keep only so many tokens of the prompt's end; -1 keeps what the context allows."""
    add_special_tokens: bool = True
    priority: int = 0
    deadline_ns: int = 0
    tenant: str = ""
    cache_salt: str = ""
    adapter: str = ""


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    token: str
    logprob: float
    rank: int = 0
    """1 is the likeliest."""
    raw: bytes = b""
    """The token's bytes, which may be a part of a character."""


@dataclass(slots=True)
class TokenEvent:
    """What one or more steps added to one sequence. The last one carries `finish_reason` or `error`.

    Counts are of the whole sequence so far; `queue_s` and `prefill_s` are set from the first token on.
    """

    request_id: str
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[Sequence[TokenLogprob]] = ()
    """One list a token: the sampled one first, then the alternatives."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: EnginehouseError | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    prompt_token_ids: Sequence[int] | None = None
    prompt_text: str | None = None
    prompt_logprobs: Sequence[Sequence[TokenLogprob] | None] | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    embedding: bytes = b""
    """float32, little-endian."""


@dataclass(frozen=True, slots=True)
class MetricFamily:
    """One family of the Prometheus exposition. `kind` is counter, gauge or histogram.

    A sample is (suffix, labels, value); suffixes are "", "_total", "_bucket", "_sum", "_count".
    """

    name: str
    kind: str
    help: str
    samples: Sequence[tuple[str, Mapping[str, str], float]]
