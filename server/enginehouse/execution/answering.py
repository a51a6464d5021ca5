"""Keeps the promise of `contract.Batch`: one final response for each request and one `on_done`, whatever the
instance does. On the loop; no I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from enginehouse.errors import EnginehouseError, FailureReason, Unsupported, error_of
from enginehouse.execution.contract import Batch, ExecutionTimes
from enginehouse.execution.joining import Joiner
from enginehouse.execution.patience import Progress
from enginehouse.types import InferRequest, InferResponse, Tensor


class RunningBatch:
    """A batch from `execute` until its last final response."""

    __slots__ = (
        "batch", "finals_owed", "instance_busy", "model_name", "model_version", "num_owed", "progress", "views",
    )  # fmt: skip

    def __init__(self, batch: Batch, model_name: str, model_version: str, progress: Progress) -> None:
        self.batch = batch
        self.model_name = model_name
        self.model_version = model_version
        self.finals_owed = [True] * len(batch.requests)
        self.num_owed = len(batch.requests)
        self.instance_busy = True
        self.progress = progress
        self.views: list[InferRequest] = []
        """In a thread host: the requests as the instance got them."""

    @property
    def is_held(self) -> bool:
        """Its model waits, or soon will, until somebody takes an answer."""
        return any(
            request.num_responses - request.num_taken >= request.max_ahead
            for request in self.batch.requests
            if request.max_ahead and not request.cancelled
        )

    @property
    def finished(self) -> bool:
        return self.num_owed == 0 and not self.instance_busy

    def respond(self, index: int, response: InferResponse) -> None:
        """Passes an answer on. What a model sends after its final one is dropped: the client has gone."""
        if not self.finals_owed[index]:
            return
        self.progress.count += 1
        if response.final:
            self.finals_owed[index] = False
            self.num_owed -= 1
        if response.reschedule:
            self._reschedule(index)
            return
        self.batch.on_response(self.batch.requests[index], response)

    def stamp(self, times: ExecutionTimes) -> None:
        """Writes when the batch ran into its requests, for traces: before they get their answers."""
        for request in self.batch.requests:
            stamps = request.times
            stamps.compute_input_end_ns = times.input_end_ns
            stamps.compute_output_start_ns = times.output_start_ns
            stamps.ended_ns = times.end_ns

    def _reschedule(self, index: int) -> None:
        request = self.batch.requests[index]
        if self.batch.on_reschedule is not None:
            self.batch.on_reschedule(request)
            return
        error = Unsupported(
            f"model '{self.model_name}' wants a request to be rescheduled, which needs "
            f"sequence_batching.iterative_sequence in its config",
            reason=FailureReason.BACKEND,
        )
        self.batch.on_response(request, self.response(index, error=error))

    def release(self, times: ExecutionTimes, error: EnginehouseError | None) -> None:
        """The instance is free. With an error every request without a final answer gets it."""
        if error is not None:
            self.fail_owed(error)
        if self.instance_busy:
            self.instance_busy = False
            self.batch.on_done(self.batch, times, error)

    def fail_owed(self, error: EnginehouseError) -> None:
        for index, owed in enumerate(self.finals_owed):
            if owed:
                failure = error_of(error.code, error.message, error.reason or FailureReason.BACKEND)
                self.respond(index, self.response(index, error=failure))

    def response(
        self,
        index: int,
        outputs: Sequence[Tensor] = (),
        error: EnginehouseError | None = None,
        final: bool = True,
    ) -> InferResponse:
        request = self.batch.requests[index]
        return InferResponse(outputs, error, final, {}, self.model_name, self.model_version, request.id)

    def index_of(self, request: InferRequest) -> int | None:
        """Where the request is in the batch, if it still waits for its final answer."""
        for index, candidate in enumerate(self.batch.requests):
            if candidate is request:
                return index if self.finals_owed[index] else None
        return None


class WorkerBatch(RunningBatch):
    """A batch in a worker's instance."""

    __slots__ = (
        "batch_id", "busy_ns", "instance_id", "joiner", "let_go_ns", "on_finished", "sent_ns", "slot", "takes_tensors",
    )  # fmt: skip

    def __init__(
        self,
        batch: Batch,
        model: str,
        version: str,
        joiner: Joiner,
        instance_id: int,
        slot: int,
        takes_tensors: bool,
        on_finished: Callable[[WorkerBatch], None],
        progress: Progress,
    ) -> None:
        super().__init__(batch, model, version, progress)
        self.batch_id = 0
        self.instance_id = instance_id
        self.slot = slot
        self.joiner = joiner
        self.takes_tensors = takes_tensors
        self.sent_ns = 0
        self.busy_ns = 0
        self.let_go_ns = 0
        """When an answer was taken last, where that is waited for."""
        self.on_finished = on_finished

    def fail(self, error: EnginehouseError) -> None:
        now_ns = time.monotonic_ns()
        start_ns = self.sent_ns or now_ns
        self.release(ExecutionTimes(start_ns, start_ns, now_ns, now_ns), error)
        self.on_finished(self)
