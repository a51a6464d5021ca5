"""The queue against a plain list, over random arrivals, timeouts, cancellations and cuts."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from enginehouse.errors import Unavailable
from enginehouse.scheduling.queue import QueuePolicy, RequestQueue, Ticket
from enginehouse.types import InferRequest

POLICIES = (
    QueuePolicy(default_timeout_us=5, allow_timeout_override=True, max_queue_size=4),
    QueuePolicy(delay_late=True, default_timeout_us=3),
    QueuePolicy(),
)


class QueueMachine(RuleBasedStateMachine):
    """`waiting` holds (level, is late, arrival, ticket): sorted, that is the order of service."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RequestQueue(POLICIES, default_level=1)
        self.now_ns = 0
        self.num_arrivals = 0
        self.waiting: list[tuple[int, bool, int, Ticket]] = []

    @rule(
        priority=st.integers(0, 4),
        timeout_us=st.integers(0, 9),
        deadline_us=st.sampled_from([0, 0, 4]),
        rows=st.integers(0, 3),
    )
    def add(self, priority: int, timeout_us: int, deadline_us: int, rows: int) -> None:
        request = InferRequest("m", priority=priority, timeout_us=timeout_us, batch_size=rows)
        request.deadline_ns = self.now_ns + 1000 * deadline_us if deadline_us else 0
        ticket = Ticket(request, self.now_ns)
        level = priority - 1 if 1 <= priority <= len(POLICIES) else 1
        limit = POLICIES[level].max_queue_size
        is_full = 0 < limit <= sum(entry[0] == level for entry in self.waiting)
        try:
            self.queue.add(ticket)
        except Unavailable:
            assert is_full
            return
        assert not is_full
        self.num_arrivals += 1
        self.waiting.append((level, False, self.num_arrivals, ticket))

    @rule(passed_us=st.integers(1, 4))
    def time_passes(self, passed_us: int) -> None:
        self.now_ns += 1000 * passed_us
        refused = set(self.queue.expire(self.now_ns))
        expected = set()
        for entry in list(self.waiting):
            level, is_late, _, ticket = entry
            policy, request = POLICIES[level], ticket.request
            timeout_us = policy.timeout_us(request.timeout_us)
            is_overdue = bool(timeout_us) and ticket.queued_ns + 1000 * timeout_us <= self.now_ns
            if 0 < request.deadline_ns <= self.now_ns or (is_overdue and not policy.delay_late):
                expected.add(ticket)
                self.waiting.remove(entry)
            elif is_overdue and not is_late:
                self.waiting.remove(entry)
                self.num_arrivals += 1
                self.waiting.append((level, True, self.num_arrivals, ticket))
        assert refused == expected

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel_one(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.waiting))
        self.queue.take((entry[3],))
        self.waiting.remove(entry)

    @rule(count=st.integers(1, 3))
    def cut_some(self, count: int) -> None:
        tickets = [ticket for ticket, _ in zip(self.queue, range(count), strict=False)]
        self.queue.cut(tickets)
        self.waiting = [entry for entry in self.waiting if entry[3] not in tickets]

    @invariant()
    def the_order_of_service_is_kept(self) -> None:
        in_order = sorted(self.waiting, key=lambda entry: entry[:3])
        assert list(self.queue) == [entry[3] for entry in in_order]
        assert self.queue.num_requests == len(self.waiting)
        assert self.queue.num_rows == sum(entry[3].rows for entry in self.waiting)

    @invariant()
    def no_timeout_is_missed(self) -> None:
        moments = [entry[3].timeout_ns for entry in self.waiting] + [
            entry[3].request.deadline_ns for entry in self.waiting
        ]
        first = min((moment for moment in moments if moment > self.now_ns), default=0)
        if first:
            assert 0 < self.queue.next_timeout_ns <= first


QueueMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestQueueMachine = QueueMachine.TestCase
