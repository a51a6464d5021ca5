"""A language model asked over the v2 protocols: tensors in, a generation, tensors out.

The tensors are those of Triton's vLLM backend: `text_input`, `stream`, `sampling_parameters` (JSON) and the
switches for further outputs. Request parameters (the extra keys of /generate) are sampling parameters too.
The engine batches by itself, so nothing is queued here.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
import numpy as np

from enginehouse.errors import InvalidArgument
from enginehouse.execution.contract import ExecutionTimes, GenerativeHandle, InstanceHandle
from enginehouse.scheduling.contract import ExecutionObserver, Refusal
from enginehouse.scheduling.in_flight import InFlight, cancelled, stopped
from enginehouse.types import (
    FinishReason,
    GenerateRequest,
    InferRequest,
    InferResponse,
    ParameterValue,
    SamplingParameters,
    Tensor,
    TokenEvent,
    TokenLogprob,
)

TEXT_INPUT = "text_input"
TEXT_OUTPUT = "text_output"
DEFAULT_MAX_TOKENS = 16
MAX_SEQUENCES = 128
TRUNCATE = "truncate_prompt_tokens"
_SAMPLING_FIELDS = frozenset(SamplingParameters.__dataclass_fields__)
_PROTOCOL_PARAMETERS = frozenset(
    ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "id", "binary_data_output", "stream")
)
_FURTHER_FIELDS = frozenset(("n", TRUNCATE, "best_of", "spaces_between_special_tokens", "output_kind"))
_UNSERVED_FIELDS = {
    "lora_name": "LoRA feature is not enabled.",
    "use_beam_search": "'use_beam_search': beam search is not supported",
    "structured_outputs": "'structured_outputs': constrained output is not supported",
    "guided_decoding": "'guided_decoding': constrained output is not supported",
}
"""Of vLLM's sampling parameters, and of its backend's."""


@dataclass(slots=True)
class _Exchange:
    """One v2 request and the sequences (n of them) that answer it."""

    request: InferRequest
    switches: _Switches
    ids: list[str]
    prompt: str
    texts: list[list[str]]
    last: list[TokenEvent | None]
    num_open: int
    failed: bool = False
    cumulative_logprobs: list[float] = field(default_factory=list)
    tells_logprobs: bool = False
    """Whether the sampling parameters ask for them; `cumulative_logprob` alone makes the engine give them too."""
    new_logprobs: list[list[Sequence[TokenLogprob]]] = field(default_factory=list)
    new_token_ids: list[list[int]] = field(default_factory=list)
    """Since the last response, by sequence; all of them where there is one response."""

    def forget_told(self) -> None:
        for rows in self.new_logprobs:
            rows.clear()
        for ids in self.new_token_ids:
            ids.clear()


@dataclass(frozen=True, slots=True)
class _Switches:
    """What the request wants to know beside the text."""

    stream: bool = False
    exclude_input_in_output: bool | None = None
    return_finish_reason: bool = False
    return_cumulative_logprob: bool = False
    return_logprobs: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    return_token_ids: bool = False


class GenerativeScheduler:
    """contract.Scheduler over an engine."""

    def __init__(self, model_name: str, version: str, engine: GenerativeHandle, observer: ExecutionObserver) -> None:
        self._model_name = model_name
        self._version = version
        self._engine = engine
        self._observer = observer
        self._in_flight = InFlight(observer)
        self._exchanges: dict[int, _Exchange] = {}
        self._numbers = itertools.count()
        self._closed = False

    def submit(self, request: InferRequest) -> None:
        if self._closed:
            raise stopped(request)
        switches = read_switches(request.inputs)
        sampling, num_sequences, keep = read_sampling(request.inputs, request.parameters)
        if switches.stream and switches.exclude_input_in_output is False:
            raise InvalidArgument("When streaming, `exclude_input_in_output` = False is not allowed.")
        if switches.stream and num_sequences > 1:
            raise InvalidArgument("'n' must be 1 with 'stream': the parts of several texts can't be told apart")
        tells_logprobs = sampling.logprobs is not None
        if switches.return_cumulative_logprob and not tells_logprobs:
            sampling = replace(sampling, logprobs=0)
        number = next(self._numbers)
        exchange = _Exchange(
            request,
            switches,
            [f"v2-{id(self):x}-{number}-{index}" for index in range(num_sequences)],
            text_of(request.inputs, TEXT_INPUT),
            [[] for _ in range(num_sequences)],
            [None] * num_sequences,
            num_sequences,
            cumulative_logprobs=[0.0] * num_sequences,
            tells_logprobs=tells_logprobs,
            new_logprobs=[[] for _ in range(num_sequences)],
            new_token_ids=[[] for _ in range(num_sequences)],
        )
        self._start(exchange, sampling, keep)
        request.times.queued_ns = time.monotonic_ns()
        request.on_cancel = self._cancel
        request.flow = exchange
        self._in_flight.enter()

    def set_instances(self, instances: Sequence[InstanceHandle]) -> None:
        """An engine has no instances to choose from."""

    @property
    def num_pending(self) -> int:
        return 0

    @property
    def num_in_flight(self) -> int:
        return self._in_flight.num_requests

    @property
    def num_sequences(self) -> int:
        return 0

    async def drain(self) -> None:
        await self._in_flight.drained()

    def close(self, refusal: Refusal = stopped) -> None:
        self._closed = True
        for exchange in list(self._exchanges.values()):
            self._end(exchange, InferResponse(error=refusal(exchange.request)))

    def _start(self, exchange: _Exchange, sampling: SamplingParameters, keep: int | None) -> None:
        """All sequences or none: what a refused one leaves behind is cancelled."""
        request = exchange.request
        self._exchanges[id(exchange)] = exchange
        for index, sequence_id in enumerate(exchange.ids):
            seed = sampling.seed + index if sampling.seed is not None else None
            generate = GenerateRequest(
                request.model_name,
                sequence_id,
                exchange.prompt,
                replace(sampling, seed=seed),
                stream=exchange.switches.stream,
                truncate_prompt_tokens=keep,
                priority=request.priority,
                deadline_ns=request.deadline_ns,
                tenant=request.tenant,
            )
            try:
                self._engine.submit(generate, partial(self._take, exchange, index))
            except BaseException:
                del self._exchanges[id(exchange)]
                exchange.failed = True
                for started in exchange.ids[:index]:
                    self._engine.cancel(started)
                raise

    def _take(self, exchange: _Exchange, index: int, event: TokenEvent) -> None:
        if exchange.failed or id(exchange) not in self._exchanges:
            return
        exchange.last[index] = event
        if event.error is not None:
            self._end(exchange, InferResponse(error=event.error))
            return
        exchange.texts[index].append(event.text)
        exchange.cumulative_logprobs[index] += sum(alternatives[0].logprob for alternatives in event.logprobs)
        exchange.new_token_ids[index].extend(event.token_ids)
        if exchange.tells_logprobs:
            exchange.new_logprobs[index].extend(event.logprobs)
        is_last = event.finish_reason is not None
        exchange.num_open -= is_last
        if event.finish_reason is FinishReason.ABORT and exchange.request.cancelled:
            self._end(exchange, InferResponse(error=cancelled()))
        elif exchange.switches.stream:
            self._send_part(exchange, event, is_last)
        elif exchange.num_open == 0:
            self._finish(exchange, self._outputs(exchange, ["".join(parts) for parts in exchange.texts]))

    def _send_part(self, exchange: _Exchange, event: TokenEvent, is_last: bool) -> None:
        outputs = self._outputs(exchange, [event.text])
        if is_last:
            self._finish(exchange, outputs)
        else:
            self._in_flight.deliver(exchange.request, self._response(exchange, outputs, final=False))

    def _finish(self, exchange: _Exchange, outputs: list[Tensor]) -> None:
        self._count(exchange)
        self._end(exchange, self._response(exchange, outputs, final=True))

    def _count(self, exchange: _Exchange) -> None:
        """For the statistics, a generation is a batch of one: queue, prefill as input, decode as compute."""
        first = exchange.last[0]
        assert first is not None, "bug: a finished exchange has events"
        queued_ns, now_ns = exchange.request.times.queued_ns, time.monotonic_ns()
        start_ns = min(queued_ns + int(first.queue_s * 1e9), now_ns)
        prefilled_ns = min(start_ns + int(first.prefill_s * 1e9), now_ns)
        times = ExecutionTimes(start_ns, prefilled_ns, now_ns, now_ns)
        self._observer.on_batch([exchange.request], None, times, None)

    def _end(self, exchange: _Exchange, response: InferResponse) -> None:
        del self._exchanges[id(exchange)]
        if response.error is not None:
            exchange.failed = True
            for sequence_id in exchange.ids:
                self._engine.cancel(sequence_id)
        response.model_name, response.id = self._model_name, exchange.request.id
        response.model_version = self._version
        self._in_flight.deliver(exchange.request, response)

    def _cancel(self, request: InferRequest) -> None:
        exchange = request.flow
        if isinstance(exchange, _Exchange) and id(exchange) in self._exchanges:
            self._end(exchange, InferResponse(error=cancelled()))

    def _response(self, exchange: _Exchange, outputs: list[Tensor], final: bool) -> InferResponse:
        request = exchange.request
        return InferResponse(
            outputs, final=final, model_name=self._model_name, model_version=self._version, id=request.id
        )

    def _outputs(self, exchange: _Exchange, texts: list[str]) -> list[Tensor]:
        switches = exchange.switches
        if not switches.stream and not switches.exclude_input_in_output:
            texts = [exchange.prompt + text for text in texts]
        events = [event for event in exchange.last if event is not None]
        outputs = [_strings(TEXT_OUTPUT, texts)]
        if switches.return_finish_reason:
            reasons = [event.finish_reason.value if event.finish_reason else "None" for event in events]
            outputs.append(_strings("finish_reason", reasons))
        if switches.return_cumulative_logprob:
            sums = np.array(exchange.cumulative_logprobs, np.float32)
            outputs.append(Tensor.from_numpy("cumulative_logprob", sums))
        if switches.return_logprobs:
            known = exchange.new_logprobs if exchange.tells_logprobs else [None] * len(texts)
            outputs.append(_strings("logprobs", [_logprobs_json(rows) for rows in known]))
        if switches.return_num_input_tokens:
            count = np.array([events[0].num_prompt_tokens], np.uint32)
            outputs.append(Tensor.from_numpy("num_input_tokens", count))
        if switches.return_num_output_tokens:
            counts = np.array([len(ids) for ids in exchange.new_token_ids], np.uint32)
            outputs.append(Tensor.from_numpy("num_output_tokens", counts))
        if switches.return_token_ids:
            outputs.append(_strings("token_ids", [_json(ids) for ids in exchange.new_token_ids]))
        exchange.forget_told()
        wanted = exchange.request.requested_outputs
        return [tensor for tensor in outputs if not wanted or tensor.name in wanted]


def read_switches(inputs: Mapping[str, Tensor]) -> _Switches:
    """The boolean inputs."""
    names = _Switches.__dataclass_fields__
    given = {name: inputs[name].numpy().reshape(-1) for name in names if name in inputs}
    empty = [name for name, values in given.items() if not len(values)]
    if empty:
        raise InvalidArgument(f"input '{empty[0]}' must hold one value, found none")
    return _Switches(**{name: bool(values[0]) for name, values in given.items()})


def read_sampling(
    inputs: Mapping[str, Tensor], parameters: Mapping[str, ParameterValue]
) -> tuple[SamplingParameters, int, int | None]:
    """Sampling parameters, `n` and `truncate_prompt_tokens`. Raises InvalidArgument, naming the field that is wrong."""
    values: dict[str, Any] = {key: value for key, value in parameters.items() if key not in _PROTOCOL_PARAMETERS}
    if "sampling_parameters" in inputs:
        values |= _sampling_json(text_of(inputs, "sampling_parameters"))
    values = {key: value for key, value in values.items() if value is not None}
    _refuse_unserved(values)
    num_sequences = _count_of(values.pop("n", 1))
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    known = {key: value for key, value in values.items() if key in _SAMPLING_FIELDS}
    known.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    try:
        keep = msgspec.convert(values.get(TRUNCATE), int | None, strict=False)
        return msgspec.convert(known, SamplingParameters, strict=False), num_sequences, keep
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"sampling parameters: {error}") from None


def _sampling_json(text: str) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"'sampling_parameters' is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise InvalidArgument(f"'sampling_parameters' must be a JSON object, found {type(given).__name__}")
    unknown = sorted(given.keys() - _SAMPLING_FIELDS - _FURTHER_FIELDS - _UNSERVED_FIELDS.keys())
    if unknown:
        raise InvalidArgument(f"'sampling_parameters' has no '{unknown[0]}'; there are: {_field_names()}")
    return given


def _field_names() -> str:
    return ", ".join(sorted(_SAMPLING_FIELDS | {"n", TRUNCATE}))


def _refuse_unserved(values: Mapping[str, Any]) -> None:
    for name, text in _UNSERVED_FIELDS.items():
        if values.get(name):
            raise InvalidArgument(text)


def _count_of(value: object) -> int:
    try:
        count = int(str(value))
    except ValueError:
        count = 0
    if not 1 <= count <= MAX_SEQUENCES:
        raise InvalidArgument(f"'n' must be a whole number between 1 and {MAX_SEQUENCES}, found {value!r}")
    return count


def text_of(inputs: Mapping[str, Tensor], name: str) -> str:
    """The only element of a BYTES input. Raises InvalidArgument if it is not UTF-8."""
    elements = inputs[name].numpy().reshape(-1)
    if len(elements) != 1:
        raise InvalidArgument(f"input '{name}' must hold one string, found {len(elements)}")
    try:
        return bytes(elements[0]).decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"input '{name}' is not UTF-8: {error}") from None


def _strings(name: str, texts: Sequence[str]) -> Tensor:
    array = np.empty(len(texts), dtype=object)
    array[:] = [text.encode() for text in texts]
    return Tensor.from_numpy(name, array)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _logprobs_json(rows: Sequence[Sequence[TokenLogprob]] | None) -> str:
    """Alternatives by token id for each token, as Triton's vLLM backend writes them; null if nobody asked."""
    if rows is None:
        return "null"
    return _json(
        [
            {
                str(one.token_id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.token}
                for one in alternatives
            }
            for alternatives in rows
        ]
    )
