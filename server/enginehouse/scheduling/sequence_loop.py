"""The loop that performs the decisions for sequences: one lane of slots for each instance.

A request first waits in its sequence, whose requests run one after the other. Everything runs as callbacks
on the server's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from enginehouse.errors import EnginehouseError, FailureReason, Unavailable
from enginehouse.execution.contract import Batch, ExecutionTimes, InstanceHandle
from enginehouse.scheduling.clock import Alarm, Clock, LoopClock
from enginehouse.scheduling.contract import ExecutionObserver, Refusal
from enginehouse.scheduling.dynamic_batching import DynamicBatching, Wait
from enginehouse.scheduling.in_flight import InFlight, cancelled, expired, stopped
from enginehouse.scheduling.ordering import ResponseOrder
from enginehouse.scheduling.queue import Ticket
from enginehouse.scheduling.rate_limiter import InstanceLimits
from enginehouse.scheduling.sequence_batching import DirectBatching
from enginehouse.scheduling.sequence_book import SequenceBook, SequenceRun
from enginehouse.scheduling.sequence_lanes import InstanceLane, SequenceOptions
from enginehouse.types import InferRequest, InferResponse


class SequenceScheduler:
    """The contract's Scheduler for models with sequence batching."""

    def __init__(
        self,
        options: SequenceOptions,
        instances: Sequence[InstanceHandle],
        observer: ExecutionObserver,
        clock: Clock | None = None,
        limits: InstanceLimits | None = None,
    ) -> None:
        self._options = options
        self._requests = options.requests
        self._observer = observer
        self._clock = clock or LoopClock()
        self._limits = limits
        if limits is not None:
            limits.on_room = self._look_everywhere
        self._in_flight = InFlight(observer)
        self._order = ResponseOrder(self._in_flight.deliver) if options.preserves_order else None
        self._deliver = self._in_flight.deliver if self._order is None else self._order.respond
        self._book = SequenceBook(options.requests.model_name, options.max_idle_ns)
        self._lanes: dict[InstanceHandle, InstanceLane] = {}
        self._lane_numbers = count()
        self._alarm = Alarm(self._clock, self._on_alarm)
        self._num_waiting = 0
        self._next_deadline_ns = 0
        self._hold = options.hold
        self._is_closed = False
        self._iterations = count(1)
        self.set_instances(instances)

    # --- the contract

    @property
    def num_pending(self) -> int:
        return self._num_waiting

    @property
    def num_in_flight(self) -> int:
        return self._in_flight.num_requests

    @property
    def num_sequences(self) -> int:
        return len(self._book.sequences)

    def submit(self, request: InferRequest) -> None:
        if self._is_closed:
            raise stopped(request)
        if request.cancelled:
            raise cancelled()
        self._check(request)
        now_ns = request.times.queued_ns = self._clock.now_ns()
        ticket = Ticket(request, now_ns, self._requests.shape_key(request))
        sequence = self._book.admit(request, ticket, now_ns)
        request.flow = sequence
        request.on_cancel = self._cancel_waiting
        self._in_flight.enter()
        self._num_waiting += 1
        if request.deadline_ns and not 0 < self._next_deadline_ns < request.deadline_ns:
            self._next_deadline_ns = request.deadline_ns
        self._settle(sequence)
        if self._hold.is_active and self._hold.admitted(sequence.lane):
            for lane in self._lanes.values():
                self._look_soon(lane)
        self._set_alarm()

    def set_instances(self, instances: Sequence[InstanceHandle]) -> None:
        """An instance that goes away or restarts has lost what its model knew: its sequences end."""
        usable = [instance for instance in instances if instance.available]
        if self._limits is not None:
            self._limits.set_instances(instances)
        for instance in [known for known in self._lanes if known not in usable]:
            self._lose(self._lanes.pop(instance))
        for instance in usable:
            if instance not in self._lanes:
                slots: list[SequenceRun | None] = [None] * self._options.num_slots
                lane = InstanceLane(next(self._lane_numbers), instance, slots)
                self._lanes[instance] = lane
                self._book.add_slots(lane, self._options.num_slots)
        for sequence in self._book.fill():
            self._settle(sequence)

    async def drain(self) -> None:
        """Nothing more comes: a sequence that waits for its client only keeps others from their slots."""
        for sequence in self._book.sequences:
            self._book.close(sequence)
            self._finish_if_over(sequence)
        await self._in_flight.drained()

    def close(self, refusal: Refusal = stopped) -> None:
        self._is_closed = True
        if self._limits is not None:
            self._limits.close()
        for sequence in self._book.sequences:
            self._end(sequence, refusal)
        self._alarm.set(0)

    # --- accepting

    def _check(self, request: InferRequest) -> None:
        if self._options.is_iterative:
            request.sequence_start, request.sequence_end = True, False
            request.correlation_id = request.correlation_id or next(self._iterations)
        self._requests.check(request)
        if self._num_waiting >= self._options.max_waiting:
            raise Unavailable(
                f"[request id: {request.id or '<id_unknown>'}] Exceeds maximum queue size",
                reason=FailureReason.REJECTED,
            )

    def _settle(self, sequence: SequenceRun) -> None:
        """The sequence has a new request or a new slot: let its lane know."""
        if self._options.is_iterative:
            self._book.close(sequence)
        lane = sequence.lane
        if lane is None:
            return
        assert isinstance(lane, InstanceLane), "bug: the book knows only these lanes"
        lane.slots[sequence.slot] = sequence
        self._feed(lane, sequence)
        self._look_soon(lane)

    def _feed(self, lane: InstanceLane, sequence: SequenceRun) -> None:
        """`oldest`: puts the sequence's next request among those that may be cut."""
        if isinstance(self._options.batching, DynamicBatching) and sequence.waiting and not sequence.is_running:
            sequence.is_running = True
            ticket = Ticket(sequence.waiting[0].request, self._clock.now_ns(), sequence.waiting[0].shape_key)
            sequence.waiting[0] = ticket
            self._requests.prepare(sequence, ticket)
            lane.ready.add(ticket)
            self._hold.fed(lane)

    # --- deciding

    def _look_soon(self, lane: InstanceLane) -> None:
        if not lane.is_due:
            lane.is_due = True
            self._clock.call_soon(lambda: self._look(lane, self._clock.now_ns()))

    def _look_everywhere(self) -> None:
        for lane in list(self._lanes.values()):
            self._look(lane, self._clock.now_ns())

    def _look(self, lane: InstanceLane, now_ns: int) -> None:
        lane.is_due = False
        lane.wait = None
        if isinstance(self._options.batching, DirectBatching):
            self._look_direct(lane, self._options.batching, now_ns)
        else:
            self._look_oldest(lane, self._options.batching, now_ns)
        self._set_alarm()

    def _may_run(self, lane: InstanceLane, num_batches: int) -> bool:
        return lane.num_batches < num_batches and not (lane.is_retired or self._hold.holds(lane))

    def _look_direct(self, lane: InstanceLane, batching: DirectBatching, now_ns: int) -> None:
        if not self._may_run(lane, 1):
            return
        for sequence in lane.slots:
            if sequence is not None and sequence.waiting:
                self._requests.prepare(sequence, sequence.waiting[0])
        decision = batching.decide(lane.slots, now_ns)
        if isinstance(decision, Wait):
            lane.wait = decision
        elif decision is not None and self._acquire(lane):
            pattern = next(sequence for sequence in decision.rows if sequence is not None)
            null_of = pattern.waiting[0].request
            requests = [
                self._requests.null_request(null_of) if sequence is None else self._cut(sequence, now_ns)
                for sequence in decision.rows
            ]
            self._hand_over(lane, requests)

    def _look_oldest(self, lane: InstanceLane, batching: DynamicBatching, now_ns: int) -> None:
        while lane.ready.num_requests and self._may_run(lane, lane.instance.num_slots):
            decision = batching.decide(lane.ready, now_ns)
            if isinstance(decision, Wait):
                lane.wait = decision
            if decision is None or isinstance(decision, Wait) or not self._acquire(lane):
                break
            lane.ready.take(decision.tickets)
            self._hand_over(lane, [self._cut(ticket.request.flow, now_ns) for ticket in decision.tickets])

    def _acquire(self, lane: InstanceLane) -> bool:
        return self._limits is None or self._limits.acquire_one([lane.instance]) is not None

    # --- running

    def _cut(self, sequence: SequenceRun, now_ns: int) -> InferRequest:
        """The sequence's next request with everything in it that the model sees."""
        request = sequence.waiting.popleft().request
        self._num_waiting -= 1
        sequence.is_running = True
        sequence.runs_on = sequence.lane
        request.times.started_ns = now_ns
        request.on_cancel = self._cancel_running
        self._requests.complete(sequence, request)
        if self._order is not None:
            self._order.open(request)
        return request

    def _hand_over(self, lane: InstanceLane, requests: Sequence[InferRequest]) -> None:
        lane.num_batches += 1
        real = [request for request in requests if request.flow is not None]
        sequences = [request.flow for request in real]
        batch = Batch(
            requests,
            self._on_response,
            self._on_done,
            self._on_reschedule,
            instance=lane.instance,
            context=(lane, real, sequences),
        )
        lane.instance.execute(batch)

    def _on_response(self, request: InferRequest, response: InferResponse) -> None:
        sequence: SequenceRun | None = request.flow
        if sequence is None:
            return  # a null request's
        self._requests.absorb(sequence, request, response)
        if response.final:
            request.on_cancel = None
        self._deliver(request, response)

    def _on_reschedule(self, request: InferRequest) -> None:
        """The model wants the request once more; it stays the only one of its sequence."""
        sequence: SequenceRun = request.flow
        request.sequence_start = False
        if request.cancelled:
            self._in_flight.refuse(request, cancelled())
            return
        request.on_cancel = self._cancel_waiting
        sequence.waiting.appendleft(Ticket(request, self._clock.now_ns(), self._requests.shape_key(request)))
        self._num_waiting += 1

    def _on_done(self, batch: Batch, times: ExecutionTimes, error: EnginehouseError | None) -> None:
        lane: InstanceLane
        lane, real, sequences = batch.context
        self._observer.on_batch(real, lane.instance, times, error, len(batch.requests) - len(real))
        lane.num_batches -= 1
        now_ns = self._clock.now_ns()
        for sequence in sequences:
            sequence.is_running = False
            self._book.touch(sequence, now_ns)
            self._finish_if_over(sequence)
            if sequence.lane is lane:
                self._feed(lane, sequence)
        self._look(lane, now_ns)
        if self._limits is not None:
            self._limits.release(lane.instance)

    # --- ending

    def _finish_if_over(self, sequence: SequenceRun) -> None:
        if sequence.is_over:
            self._finish(sequence)

    def _finish(self, sequence: SequenceRun) -> None:
        """Its slot goes to the next sequence of the backlog."""
        lane = sequence.lane
        if isinstance(lane, InstanceLane):
            lane.slots[sequence.slot] = None
        following = self._book.finish(sequence)
        if following is not None:
            self._settle(following)

    def _end(self, sequence: SequenceRun, error_of: Callable[[InferRequest], EnginehouseError], keep: int = 0) -> None:
        """Refuses the sequence's waiting requests but the first `keep`, and lets it end with those."""
        self._book.close(sequence)
        refused = list(sequence.waiting)[keep:]
        for ticket in refused:
            sequence.waiting.pop()
            self._num_waiting -= 1
            if ticket.level is not None:  # among those that may be cut
                assert isinstance(sequence.lane, InstanceLane), "bug: only sequences with a slot are fed"
                sequence.lane.ready.take((ticket,))
                sequence.is_running = False
        self._finish_if_over(sequence)
        for ticket in refused:
            self._in_flight.refuse(ticket.request, error_of(ticket.request))

    def _cancel_waiting(self, request: InferRequest) -> None:
        """What follows in the sequence can't be right without this request: it ends here."""
        sequence: SequenceRun = request.flow
        position = next(i for i, ticket in enumerate(sequence.waiting) if ticket.request is request)
        self._end(sequence, lambda _: cancelled(), keep=position if sequence.lane is not None else 0)

    def _cancel_running(self, request: InferRequest) -> None:
        lane = request.flow.runs_on
        assert isinstance(lane, InstanceLane), "bug: a running request was cut on a lane"
        lane.instance.cancel(request)

    def _lose(self, lane: InstanceLane) -> None:
        self._book.retire(lane)
        model, instance = self._options.requests.model_name, lane.instance.name

        def lost(request: InferRequest) -> Unavailable:
            return Unavailable(
                f"sequence {request.correlation_id} of model '{model}' is lost: its instance '{instance}' stopped",
                reason=FailureReason.BACKEND,
            )

        for sequence in self._book.sequences_of(lane):
            self._end(sequence, lost)

    # --- time

    def _set_alarm(self) -> None:
        moments = [lane.wait.until_ns for lane in self._lanes.values() if lane.wait is not None]
        moments += [self._book.next_idle_ns, self._book.next_expiry_ns, self._next_deadline_ns]
        when_ns = min((moment for moment in moments if moment), default=0)
        # ringing too early does no harm, setting a timer for every request does
        if not 0 < self._alarm.when_ns <= when_ns:
            self._alarm.set(when_ns)

    def _on_alarm(self, now_ns: int) -> None:
        for sequence in self._book.idle(now_ns):
            self._book.close(sequence)
            self._finish(sequence)
        for sequence in self._book.expired(now_ns):
            self._end(sequence, lambda _: _sequence_expired())
        if 0 < self._next_deadline_ns <= now_ns:
            self._expire(now_ns)
        for lane in list(self._lanes.values()):
            if lane.wait is not None and lane.wait.until_ns <= now_ns:
                self._look(lane, now_ns)
        self._set_alarm()

    def _expire(self, now_ns: int) -> None:
        self._next_deadline_ns = 0
        for sequence in self._book.sequences:
            for position, ticket in enumerate(sequence.waiting):
                deadline_ns = ticket.request.deadline_ns
                if 0 < deadline_ns <= now_ns:
                    self._end(sequence, lambda _: expired(), keep=position)
                    break
                if deadline_ns and not 0 < self._next_deadline_ns < deadline_ns:
                    self._next_deadline_ns = deadline_ns


def _sequence_expired() -> Unavailable:
    return Unavailable("timeout of the corresponding sequence has been expired", reason=FailureReason.REJECTED)
