"""The one loop that performs batching decisions: who waits, which instance is free, when to look again.

Reserve, then decide: the policy is asked only while an instance is free, so that batches are cut as late as
possible. Everything runs as callbacks on the server's loop; a request costs no task and no future.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from enginehouse.errors import EnginehouseError, Unavailable
from enginehouse.execution.contract import Batch, ExecutionTimes, InstanceHandle
from enginehouse.scheduling.clock import Alarm, Clock, LoopClock
from enginehouse.scheduling.contract import ExecutionObserver, Refusal
from enginehouse.scheduling.dynamic_batching import BatchPolicy, Cut, SingleRequests, Wait
from enginehouse.scheduling.fairness import FairQueue
from enginehouse.scheduling.in_flight import InFlight, cancelled, expired, stopped
from enginehouse.scheduling.instances import InstancePool
from enginehouse.scheduling.ordering import ResponseOrder
from enginehouse.scheduling.queue import RequestQueue, Ticket
from enginehouse.scheduling.rate_limiter import InstanceLimits
from enginehouse.scheduling.tuning import BatchTuner, TunedBatching, Tuning
from enginehouse.types import InferRequest, InferResponse


@dataclass
class BatchingOptions:
    """How one version's requests are batched."""

    policy: BatchPolicy = field(default_factory=SingleRequests)
    queue: RequestQueue = field(default_factory=RequestQueue)
    shape_key: Callable[[InferRequest], Hashable] | None = None
    length_of: Callable[[InferRequest], int] | None = None
    """For policies that pad."""
    tuner: BatchTuner | None = None
    """Of a policy that is tuned: told of arrivals and answers."""
    gathers: bool = False
    """Let requests that arrive together be seen together before the first batch is cut."""
    preserves_order: bool = False
    hold_until_queued: int = 0
    """No batch before so many requests wait (once): TRITONSERVER_DELAY_SCHEDULER."""


class BatchingScheduler:
    """The contract's Scheduler for models without sequences."""

    def __init__(
        self,
        options: BatchingOptions,
        instances: Sequence[InstanceHandle],
        observer: ExecutionObserver,
        clock: Clock | None = None,
        limits: InstanceLimits | None = None,
    ) -> None:
        self._policy = options.policy
        self._queue = options.queue
        self._tracks_tenants = isinstance(options.queue, FairQueue)
        self._shape_key = options.shape_key
        self._length_of = options.length_of
        self._tuner = options.tuner
        self._gathers = options.gathers
        self._hold_until_queued = options.hold_until_queued
        self._pool = InstancePool(instances)
        self._observer = observer
        self._clock = clock or LoopClock()
        self._limits = limits
        if limits is not None:
            limits.on_room = self._pass
        self._alarm = Alarm(self._clock, self._on_alarm)
        self._waiting: Wait | None = None
        self._pass_is_due = False
        self._is_closed = False
        self._in_flight = InFlight(observer)
        self._deliver = self._in_flight.deliver
        self._order = ResponseOrder(self._deliver) if options.preserves_order else None

    # --- the contract

    @property
    def num_pending(self) -> int:
        return self._queue.num_requests

    @property
    def num_in_flight(self) -> int:
        return self._in_flight.num_requests

    @property
    def num_sequences(self) -> int:
        return 0

    def submit(self, request: InferRequest) -> None:
        if self._is_closed:
            raise stopped(request)
        if request.cancelled:
            raise cancelled()
        now_ns = request.times.queued_ns = self._clock.now_ns()
        ticket = Ticket(request, now_ns, self._shape_key(request) if self._shape_key is not None else None)
        if self._length_of is not None:
            ticket.length = self._length_of(request)
        self._add(ticket)
        if self._tuner is not None:
            self._tuner.arrived(now_ns)
        request.flow = ticket
        request.on_cancel = self._cancel_queued
        self._in_flight.enter()
        if self._hold_until_queued:
            self._hold_until_queued -= 1  # cancelled ones count as well
        self._notice(ticket)

    def _add(self, ticket: Ticket) -> None:
        try:
            self._queue.add(ticket)
        except Unavailable:
            if not self._pass_is_due:
                raise
            self._pass()  # the queue is full only of what an idle instance was about to take
            self._queue.add(ticket)

    def set_instances(self, instances: Sequence[InstanceHandle]) -> None:
        self._pool.set(instances)
        if self._tuner is not None:
            self._tuner.num_instances = max(len(instances), 1)
        if self._limits is not None:
            self._limits.set_instances(instances)
        self._pass()

    @property
    def tuning(self) -> Tuning | None:
        """What the tuner decided last; None without one."""
        return self._policy.tuning if isinstance(self._policy, TunedBatching) else None

    async def drain(self) -> None:
        await self._in_flight.drained()

    def close(self, refusal: Refusal = stopped) -> None:
        self._is_closed = True
        self._alarm.set(0)
        if self._limits is not None:
            self._limits.close()
        left = list(self._queue)
        self._queue.take(left)
        for ticket in left:
            self._in_flight.refuse(ticket.request, refusal(ticket.request))

    # --- deciding

    def _notice(self, ticket: Ticket) -> None:
        """A request arrived: look at the queue unless the answer is known to be the same as before."""
        waiting = self._waiting
        if waiting is not None and self._queue.num_rows < waiting.wake_rows and ticket.shape_key == waiting.shape_key:
            self._set_alarm()
            return
        if self._gathers:
            self._look_soon()
        else:
            self._pass()

    def _look_soon(self) -> None:
        if not self._pass_is_due:
            self._pass_is_due = True
            self._clock.call_soon(self._pass)

    def _pass(self) -> None:
        self._look(self._clock.now_ns())

    def _on_alarm(self, now_ns: int) -> None:
        self._look(now_ns)

    def _look(self, now_ns: int) -> None:
        """Cuts batches for as long as there are requests, free instances and a reason not to wait."""
        self._pass_is_due = False
        self._waiting = None
        queue = self._queue
        if queue.next_timeout_ns:
            self._expire(now_ns)
        while queue.num_requests and not self._is_held():
            instance = self._pool.free()
            if instance is None:
                break
            decision = self._policy.decide(queue, now_ns)
            if decision is None:
                break
            if isinstance(decision, Wait):
                self._waiting = decision
                break
            if self._limits is not None:
                instance = self._limits.acquire_one(self._pool.all_free())
                if instance is None:
                    break
            queue.cut(decision.tickets)
            self._hand_over(decision, instance, now_ns)
        self._set_alarm()

    def _is_held(self) -> bool:
        return self._hold_until_queued > 0

    def _set_alarm(self) -> None:
        when_ns = self._queue.next_timeout_ns
        if self._waiting is not None and not 0 < when_ns < self._waiting.until_ns:
            when_ns = self._waiting.until_ns
        if when_ns != self._alarm.when_ns:
            self._alarm.set(when_ns)

    def _expire(self, now_ns: int) -> None:
        for ticket in self._queue.expire(now_ns):
            self._in_flight.refuse(ticket.request, expired())

    # --- running

    def _hand_over(self, cut: Cut, instance: InstanceHandle, now_ns: int) -> None:
        requests = [ticket.request for ticket in cut.tickets]
        for request in requests:
            request.times.started_ns = now_ns
            request.flow = instance
            request.on_cancel = self._cancel_running
            if self._order is not None:
                self._order.open(request)
        self._pool.reserve(instance)
        instance.execute(Batch(requests, self._on_response, self._on_done, instance=instance, context=cut))

    def _on_response(self, request: InferRequest, response: InferResponse) -> None:
        if response.final:
            request.on_cancel = None
            if self._tuner is not None:
                self._tuner.answered((self._clock.now_ns() - request.times.queued_ns) / 1e9)
            if self._tracks_tenants:
                self._queue.finished(request)
                self._look_soon()
        if self._order is not None:
            self._order.respond(request, response)
        else:
            self._deliver(request, response)

    def _on_done(self, batch: Batch, times: ExecutionTimes, error: EnginehouseError | None) -> None:
        instance = batch.instance
        assert instance is not None, "bug: this loop names the instance of its batches"
        self._observer.on_batch(batch.requests, instance, times, error)
        if self._policy.learns and error is None:
            self._policy.learn(batch.context, (times.end_ns - times.start_ns) / 1e9)
        self._pool.release(instance)
        if self._queue.num_requests:
            self._pass()
        if self._limits is not None:
            self._limits.release(instance)

    # --- cancelling

    def _cancel_queued(self, request: InferRequest) -> None:
        self._queue.take((request.flow,))
        self._in_flight.refuse(request, cancelled())

    def _cancel_running(self, request: InferRequest) -> None:
        request.flow.cancel(request)
