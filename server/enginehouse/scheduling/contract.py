"""What a scheduler is to the core: one per ready version, fed requests, giving each its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from enginehouse.errors import EnginehouseError
from enginehouse.execution.contract import ExecutionTimes, InstanceHandle
from enginehouse.types import InferRequest, InferResponse

Refusal: TypeAlias = Callable[[InferRequest], EnginehouseError]
"""What a request that will not run is told."""


class ExecutionObserver(Protocol):
    """Where schedulers report what happened, for statistics, metrics and traces. Cheap; on the loop."""

    def on_batch(
        self,
        requests: Sequence[InferRequest],
        instance: InstanceHandle | None,
        times: ExecutionTimes,
        error: EnginehouseError | None,
        num_null_rows: int = 0,
    ) -> None:
        """Null rows are those that a sequence batcher added: part of the batch's size and of nothing else."""
        ...
    def on_cache_hit(self, request: InferRequest, lookup_ns: int) -> None: ...
    def on_cache_miss(self, request: InferRequest, lookup_ns: int, insert_ns: int) -> None: ...
    def on_response(self, request: InferRequest, response: InferResponse) -> None:
        """Each answer of the model, before it goes to the sink; the final one ends the request."""
        ...


class Scheduler(Protocol):
    """Decides when and with whom a request runs. On the loop; nothing here blocks.

    `submit` takes ownership: it raises (queue full, no slot, bad sequence flags) and then the sink is never
    called, or the sink gets exactly one final response. It sets `request.times.queued_ns` and `on_cancel`.
    """

    def submit(self, request: InferRequest) -> None: ...

    def set_instances(self, instances: Sequence[InstanceHandle]) -> None:
        """Instances came, went, or changed their availability."""
        ...

    @property
    def num_pending(self) -> int:
        """Requests in queues, not yet handed to an instance (nv_inference_pending_request_count)."""
        ...

    @property
    def num_in_flight(self) -> int:
        """Requests accepted and without their final response."""
        ...

    @property
    def num_sequences(self) -> int:
        """Sequences that have begun and not ended: their clients may be between two requests."""
        ...

    async def drain(self) -> None:
        """Returns when nothing is in flight. New requests are still accepted: the core stops sending them."""
        ...

    def close(self, refusal: Refusal = ...) -> None:
        """Refuses whatever waits, and what comes from now on."""
        ...


SubmitRequest = Callable[[InferRequest], None]
"""How ensembles run their steps: the core's own `submit`."""
