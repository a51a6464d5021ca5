"""An instance that is a plain function, run when a test says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from enginehouse.errors import EnginehouseError, FailureReason, Internal
from enginehouse.execution.contract import Batch, ExecutionTimes
from enginehouse.execution.joining import Joiner
from enginehouse.types import Array, InferRequest, InferResponse, Tensor

Function = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class GatedInstance:
    """Implements `InstanceHandle`: keeps each batch until `step`, then runs `function` on it.

    Batches are joined and the results split again as hosts do: by the joiner of the model's config, or
    plainly along axis 0.
    """

    device = "cpu"
    group = 0

    def __init__(
        self,
        function: Function = dict,
        now_ns: Callable[[], int] = lambda: 0,
        name: str = "gated_0_0",
        num_slots: int = 1,
        joiner: Joiner | None = None,
    ) -> None:
        self.function = function
        self.name = name
        self.num_slots = num_slots
        self.available = True
        self.waiting: list[Batch] = []
        self.sizes: list[int] = []
        """Requests in each batch that ever came."""
        self.cancelled: list[InferRequest] = []
        self._now_ns = now_ns
        self._joiner = joiner or Joiner()

    def execute(self, batch: Batch) -> None:
        assert self.available
        assert len(self.waiting) < self.num_slots
        self.waiting.append(batch)
        self.sizes.append(len(batch.requests))

    def cancel(self, request: InferRequest) -> None:
        self.cancelled.append(request)

    def step(self) -> Batch:
        """Runs and answers the oldest batch."""
        batch = self.waiting.pop(0)
        error: EnginehouseError | None = None
        try:
            answers = self._run(batch.requests)
        except EnginehouseError as failure:
            error = failure
            answers = [InferResponse(error=failure) for _ in batch.requests]
        for request, answer in zip(batch.requests, answers, strict=True):
            batch.on_response(request, answer)
        self.finish(batch, error)
        return batch

    def fail(self, message: str) -> None:
        """As if the model had raised while it ran the oldest batch."""
        batch = self.waiting.pop(0)
        error = Internal(message, reason=FailureReason.BACKEND)
        for request in batch.requests:
            batch.on_response(request, InferResponse(error=error))
        self.finish(batch, error)

    def finish(self, batch: Batch, error: EnginehouseError | None = None) -> None:
        now_ns = self._now_ns()
        batch.on_done(batch, ExecutionTimes(now_ns, now_ns, now_ns, now_ns), error)

    def _run(self, requests: Sequence[InferRequest]) -> list[InferResponse]:
        joined = {tensor.name: tensor.gather().numpy() for tensor in self._joiner.join(requests)}
        results = {name: Tensor.from_numpy(name, array) for name, array in self.function(joined).items()}
        joiner = self._joiner if self._joiner.output_names else Joiner(list(results))
        return [InferResponse(outputs) for outputs in joiner.split(requests, results)]
