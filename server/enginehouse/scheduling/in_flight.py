"""The requests that a scheduler has accepted and not yet finally answered: counted, answered, waited for."""

from __future__ import annotations

import asyncio

from enginehouse.errors import Cancelled, EnginehouseError, FailureReason, Unavailable
from enginehouse.scheduling.contract import ExecutionObserver
from enginehouse.types import InferRequest, InferResponse


class InFlight:
    """Every request that enters leaves with exactly one final response."""

    def __init__(self, observer: ExecutionObserver) -> None:
        self.num_requests = 0
        self._observer = observer
        self._waiters: list[asyncio.Future[None]] = []

    def enter(self) -> None:
        self.num_requests += 1

    def deliver(self, request: InferRequest, response: InferResponse) -> None:
        """One answer, counted and sent. The final one ends the request."""
        self._observer.on_response(request, response)
        request.num_responses += response.has_response
        sink = request.sink
        assert sink is not None, "bug: a submitted request has a sink"
        if response.final:
            self.num_requests -= 1
            request.on_cancel = request.on_taken = None
            request.flow = None
            request.sink = None  # it knows the request: without this the tensors would wait for the collector
            sink(response)
            if self._waiters and not self.num_requests:
                self._wake()
        else:
            sink(response)

    def refuse(self, request: InferRequest, error: EnginehouseError) -> None:
        """The final answer to a request that will not run (any more)."""
        self.deliver(request, InferResponse(error=error))

    async def drained(self) -> None:
        """Returns when nothing is in flight."""
        if self.num_requests:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def stopped(request: InferRequest) -> Unavailable:
    return Unavailable(
        f"[request id: {request.id or '<id_unknown>'}] Server is stopping, scheduler for model has stopped "
        f"accepting new inference requests",
        reason=FailureReason.REJECTED,
    )


def cancelled() -> Cancelled:
    return Cancelled("Request cancelled", reason=FailureReason.CANCELED)


def expired() -> Unavailable:
    return Unavailable("Request timeout expired", reason=FailureReason.REJECTED)
