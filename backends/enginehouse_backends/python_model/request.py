"""pb_utils.InferenceRequest: what a model is asked, and what it asks of other models (BLS)."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from enginehouse.backend import Services
from enginehouse.types import InferRequest, InferResponse, ParameterValue
from enginehouse_backends.python_model.context import running
from enginehouse_backends.python_model.errors import TritonModelException
from enginehouse_backends.python_model.response import (
    InferenceResponse,
    InferenceResponseSender,
    check_parameters,
    give_up,
)
from enginehouse_backends.python_model.tensor import Tensor

TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 2
TRITONSERVER_REQUEST_RELEASE_ALL = 1
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = 2
TRITONSERVER_MEMORY_CPU = 0
TRITONSERVER_MEMORY_CPU_PINNED = 1
TRITONSERVER_MEMORY_GPU = 2


class PreferredMemory:
    """Where a model would like the outputs of its BLS request. Outputs come on the host whatever it says."""

    def __init__(self, preferred_memory_type: int, preferred_device_id: int = 0) -> None:
        self.preferred_memory_type = preferred_memory_type
        self.preferred_device_id = preferred_device_id


class InferenceTrace:
    """The trace of a request: passed on to a BLS request, that one becomes its child."""

    __slots__ = ("_context", "origin")

    def __init__(self, origin: Any = None, context: str = "") -> None:
        self.origin = origin
        """How the host knows the request."""
        self._context = context

    def get_context(self) -> str | None:
        """The OpenTelemetry context as JSON, None where there is none."""
        return self._context or None


class InferenceRequest:
    """Made by the backend for each request to the model, and by models for BLS."""

    __slots__ = ("_inputs", "_is_served", "_preferred_memory", "_release_flags", "_request", "_sender", "_trace")

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Sequence[Tensor] | None = None,
        requested_output_names: Sequence[str] | None = None,
        model_name: str | None = None,
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: InferenceTrace | None = None,
        parameters: Mapping[str, ParameterValue] | None = None,
    ) -> None:
        self._is_served = False
        inputs = _list_of(Tensor | None, "inputs: a list of Tensor", inputs)
        requested_output_names = _list_of(str, "requested_output_names: a list of str", requested_output_names)
        if not isinstance(model_name, str):
            raise _lacks("model_name: a str", model_name)
        if not isinstance(preferred_memory, PreferredMemory | None):
            raise _lacks("preferred_memory: a PreferredMemory", preferred_memory)
        if not isinstance(trace, InferenceTrace | None):
            raise _lacks("trace: an InferenceTrace", trace)
        what = f"for request with id '{request_id}' and model name '{model_name}'"
        if any(tensor is None for tensor in inputs):
            raise TritonModelException(f"Input tensor {what} should not be empty.")
        if any(not name for name in requested_output_names):
            raise TritonModelException(f"Requested output name {what} should not be empty.")
        if isinstance(correlation_id, bool) or not isinstance(correlation_id, (int, str)):
            raise TritonModelException("Correlation ID must be integer or string")
        self._inputs: list[Tensor] | None = inputs
        self._sender: InferenceResponseSender | None = None
        self._release_flags = TRITONSERVER_REQUEST_RELEASE_ALL
        self._preferred_memory = preferred_memory
        self._trace: InferenceTrace | None = trace or InferenceTrace()
        self._request = InferRequest(
            model_name,
            "" if model_version == -1 else str(model_version),
            request_id,
            requested_outputs=requested_output_names,
            parameters=dict(check_parameters(parameters)),
            correlation_id=correlation_id,
            timeout_us=timeout,
        )
        self.set_flags(flags)

    @classmethod
    def of_server(cls, request: InferRequest) -> InferenceRequest:
        """A request to this model."""
        made = cls.__new__(cls)
        made._is_served = True
        made._request = request
        made._inputs = None
        made._sender = None
        made._release_flags = TRITONSERVER_REQUEST_RELEASE_ALL
        made._preferred_memory = None
        made._trace = None
        return made

    def __del__(self) -> None:
        # Of a decoupled model only: any other has answered by the time that `execute` returns.
        if self._is_served and running.decoupled and self._sender is None and not self.is_rescheduled:
            give_up(self._request)

    # --- what is asked

    def inputs(self) -> list[Tensor]:
        if self._inputs is None:
            self._inputs = [Tensor.of_wire(tensor) for tensor in self._request.inputs.values()]
        return self._inputs

    def request_id(self) -> str:
        return self._request.id

    def correlation_id(self) -> int | str:
        return self._request.correlation_id

    def requested_output_names(self) -> list[str]:
        """All of the model's where the request names none."""
        return list(self._request.requested_outputs or sorted(running.output_names))

    def model_name(self) -> str:
        return self._request.model_name

    def model_version(self) -> int:
        return int(self._request.model_version or -1)

    def flags(self) -> int:
        return (1 if self._request.sequence_start else 0) | (2 if self._request.sequence_end else 0)

    def set_flags(self, flags: int) -> None:
        self._request.sequence_start = bool(flags & TRITONSERVER_REQUEST_FLAG_SEQUENCE_START)
        self._request.sequence_end = bool(flags & TRITONSERVER_REQUEST_FLAG_SEQUENCE_END)

    def timeout(self) -> int:
        """Microseconds; 0 is none."""
        return self._request.timeout_us

    def parameters(self) -> str:
        """As JSON."""
        return json.dumps(self._request.parameters, separators=(",", ":"))

    def preferred_memory(self) -> PreferredMemory | None:
        return self._preferred_memory

    def trace(self) -> InferenceTrace:
        if self._trace is None:
            context = json.dumps({"traceparent": self._request.trace}) if self._request.trace else ""
            self._trace = InferenceTrace(self._request.flow, context)
        return self._trace

    def is_cancelled(self) -> bool:
        if running.services is not None:
            running.services.poll()
        return self._request.cancelled

    def get_response_sender(self) -> InferenceResponseSender:
        if self._sender is None:
            self._sender = InferenceResponseSender(self._request)
        return self._sender

    def set_release_flags(self, flags: int) -> None:
        self._release_flags = flags

    @property
    def is_rescheduled(self) -> bool:
        return self._release_flags == TRITONSERVER_REQUEST_RELEASE_RESCHEDULE

    @property
    def served(self) -> InferRequest:
        """The server's own."""
        return self._request

    # --- asking other models

    def exec(self, decoupled: bool = False) -> InferenceResponse | ResponseIterator:
        """The answer, or with `decoupled` all of them, one by one. Errors are in the answers."""
        answers = self._start(decoupled)
        if decoupled:
            return ResponseIterator(answers)
        answers.wait()
        return answers.only()

    def async_exec(self, decoupled: bool = False) -> asyncio.Future[Any]:
        """`exec` for the running event loop. With `decoupled` done with the first answer."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        _services().listen()

        def settle() -> None:
            if not future.done():
                future.set_result(ResponseIterator(answers) if decoupled else answers.only())

        answers = self._start(decoupled, lambda: loop.call_soon_threadsafe(settle))
        return future

    def _start(self, decoupled: bool, on_answer: Any = None) -> Answers:
        if not running.is_executing_allowed:
            raise TritonModelException("BLS is only supported during the 'execute' function.")
        services = _services()
        request = self._request
        request.inputs = {tensor.name(): tensor.to_wire() for tensor in self.inputs()}
        request.flow = self._trace.origin if self._trace is not None else None
        answers = Answers(request, services, decoupled, on_answer)
        services.infer(request, decoupled)
        return answers


def _lacks(what: str, found: object) -> TypeError:
    return TypeError(f"InferenceRequest() needs {what}; it has {'none' if found is None else repr(found)}")


def _list_of(kind: Any, what: str, values: Sequence[Any] | None) -> list[Any]:
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    if values is None or not is_list or not all(isinstance(value, kind) for value in values):
        raise _lacks(what, values)
    return list(values)


def _services() -> Services:
    if running.services is None:
        raise TritonModelException("This model runs without a server: there are no other models to ask.")
    return running.services


class Answers:
    """What has come in for one BLS request. The sink runs on whichever thread reads for the process."""

    def __init__(self, request: InferRequest, services: Services, decoupled: bool, on_answer: Any) -> None:
        self.request = request
        self._services = services
        self._decoupled = decoupled
        self._on_answer = on_answer
        self._lock = threading.Lock()
        self._arrived: deque[InferResponse] = deque()
        self.finished = False
        request.sink = self._take

    def _take(self, response: InferResponse) -> None:
        with self._lock:
            self._arrived.append(response)
            self.finished = self.finished or response.final
        if self._on_answer is not None and (self._decoupled or response.final):
            self._on_answer()

    def wait(self) -> None:
        """Until there is an answer to take (decoupled) or the only one."""
        self._services.wait_until(lambda: bool(self._arrived) if self._decoupled else self.finished)

    def only(self) -> InferenceResponse:
        """Of a model that isn't decoupled: its answer; the closing flag may come apart from it."""
        answers = [response for response in self._arrived if response.has_response]
        return InferenceResponse.of_server(answers[0] if answers else InferResponse())

    def take(self) -> InferResponse:
        self.wait()
        return self._arrived.popleft()


class ResponseIterator:
    """The answers of a decoupled model in their order. The last is empty where the model closed with a bare
    flag. Iterating again gives the same answers again."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._seen: list[InferenceResponse] = []
        self._position = 0
        self._complete = False

    def __iter__(self) -> Iterator[InferenceResponse]:
        self._position = 0
        return self

    def __next__(self) -> InferenceResponse:
        if self._position == len(self._seen):
            if self._complete:
                raise StopIteration
            response = self._answers.take()
            self._complete = response.final
            self._seen.append(InferenceResponse.of_server(response))
        self._position += 1
        return self._seen[self._position - 1]

    def cancel(self) -> None:
        """Tells the other model that nobody wants the rest."""
        self._answers.request.cancel()
