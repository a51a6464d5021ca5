"""One traced request: its times and tensors, and those of the requests that it caused (ensemble steps, BLS).

A Span exists only for requests that were sampled. The front end makes the root, core lets every span `follow`
its request; times come from the request itself when its final answer passes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

from enginehouse.errors import InvalidArgument
from enginehouse.observe.trace_settings import TraceLevel
from enginehouse.types import DataType, InferRequest, InferResponse, Tensor


class TraceRecorder(Protocol):
    """Where a trace is kept: JSON entries for a file, or OpenTelemetry spans."""

    level: TraceLevel

    def new_id(self) -> int: ...
    def started(self, span: Span, request: InferRequest, version: int) -> None: ...
    def stamped(self, span: Span, name: str, ns: int) -> None: ...
    def tensor(self, span: Span, activity: str, tensor: Tensor) -> None: ...
    def ended(self, span: Span, request: InferRequest) -> None: ...
    def finished(self, root: Span) -> None: ...
    def traceparent(self, span: Span) -> str: ...


class Span:
    """A request of a trace. `root` is the one that came over the wire; it alone is finished."""

    __slots__ = ("_is_finished", "id", "native", "parent_id", "recorder", "root")

    def __init__(self, recorder: TraceRecorder, root: Span | None = None, parent_id: int = 0) -> None:
        self.recorder = recorder
        self.id = recorder.new_id()
        self.parent_id = parent_id
        self.root = root or self
        self.native: Any = None
        """What the recorder keeps with the span."""
        self._is_finished = False

    def child(self) -> Span:
        """For a request that this one causes: `step_request.trace = request.trace.child()`."""
        return Span(self.recorder, self.root, self.id)

    def stamp(self, name: str, ns: int = 0) -> None:
        """A front end's moment, such as HTTP_RECV_START; now if no time is given."""
        self.recorder.stamped(self, name, ns or time.monotonic_ns())

    def follow(self, request: InferRequest, version: int) -> None:
        """From here until the final answer. Core calls it as it accepts a traced request for `version`."""
        self.recorder.started(self, request, version)
        if self.recorder.level & TraceLevel.TENSORS:
            for tensor in request.inputs.values():
                self.recorder.tensor(self, "TENSOR_QUEUE_INPUT", tensor)
        sink = request.sink
        assert sink is not None, "bug: core follows requests that have a sink"

        def watch(response: InferResponse) -> None:
            self._answered(request, response)
            sink(response)

        request.sink = watch

    def _answered(self, request: InferRequest, response: InferResponse) -> None:
        if self.recorder.level & TraceLevel.TENSORS:
            for tensor in response.outputs:
                self.recorder.tensor(self, "TENSOR_BACKEND_OUTPUT", tensor)
        if self.root is self:
            self.stamp("INFER_RESPONSE_COMPLETE")  # a front end's moment: steps of ensembles have none
        if response.final:
            self.recorder.ended(self, request)

    def finish(self) -> None:
        """The answer is sent: the trace is complete. For roots; a second call does nothing."""
        if not self._is_finished:
            self._is_finished = True
            self.recorder.finished(self)

    @property
    def traceparent(self) -> str:
        """W3C context for whoever continues the trace elsewhere; empty where the mode has none."""
        return self.recorder.traceparent(self)


def activities(request: InferRequest, now_ns: int) -> Iterable[tuple[str, int]]:
    """Triton's names for the moments of a request, in order; those that never came are left out."""
    times = request.times
    moments = (
        ("QUEUE_START", times.queued_ns),
        ("COMPUTE_START", times.started_ns),
        ("COMPUTE_INPUT_END", times.compute_input_end_ns),
        ("COMPUTE_OUTPUT_START", times.compute_output_start_ns),
        ("COMPUTE_END", (times.ended_ns or now_ns) if times.started_ns else 0),
        ("REQUEST_END", now_ns),
    )
    return ((name, ns) for name, ns in moments if ns)


def tensor_text(tensor: Tensor) -> dict[str, str]:
    """A tensor as Triton's traces write it: everything a string, elements joined by commas."""
    return {
        "name": tensor.name,
        "data": _elements(tensor),
        "shape": ",".join(map(str, tensor.shape)),
        "dtype": tensor.datatype.wire_name,
    }


def _elements(tensor: Tensor) -> str:
    if tensor.datatype in (DataType.FP16, DataType.BF16):
        return ""
    try:
        values = tensor.numpy().reshape(-1)
    except InvalidArgument:
        return ""
    match values.dtype.kind:
        case "O":
            return ",".join('"' + each.decode("utf-8", "replace") + '"' for each in values)
        case "b":
            return ",".join(str(int(each)) for each in values)
        case "f":
            return ",".join(f"{each:g}" for each in values.tolist())
    return ",".join(map(str, values.tolist()))
