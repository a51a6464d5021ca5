"""The waiting requests of one model: bounded, in priority levels, each level with its own policy.

Pure: no clock, no I/O; times come in as arguments. Level 1 is served first. Inside a level requests keep
their order of arrival; those that outstayed a DELAY timeout are served after all others of their level.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from enginehouse.config.schema import ModelDynamicBatching, ModelQueuePolicy
from enginehouse.errors import FailureReason, Unavailable
from enginehouse.types import InferRequest


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """What one level does with too many requests and with those that wait too long."""

    delay_late: bool = False
    """Late requests wait behind the others instead of being refused."""
    default_timeout_us: int = 0
    allow_timeout_override: bool = False
    max_queue_size: int = 0
    """0 is unbounded."""

    @classmethod
    def of(cls, policy: ModelQueuePolicy) -> QueuePolicy:
        return cls(
            policy.timeout_action == ModelQueuePolicy.DELAY,
            policy.default_timeout_microseconds,
            policy.allow_timeout_override,
            policy.max_queue_size,
        )

    def timeout_us(self, asked_us: int) -> int:
        """A request may only shorten a timeout, and only one that is set."""
        if self.allow_timeout_override and 0 < asked_us < self.default_timeout_us:
            return asked_us
        return self.default_timeout_us


class Ticket:
    """A request's place in the queue."""

    __slots__ = ("gone", "is_late", "length", "level", "queued_ns", "request", "rows", "shape_key", "timeout_ns")

    def __init__(self, request: InferRequest, queued_ns: int, shape_key: Hashable = None) -> None:
        self.request = request
        self.rows = request.batch_size or 1
        self.shape_key = shape_key
        """Requests with different keys never share a batch."""
        self.queued_ns = queued_ns
        self.length = 0
        """Along the axis that may be padded."""
        self.timeout_ns = 0
        self.level: _Level | None = None
        self.gone = False
        self.is_late = False


class _Level:
    __slots__ = ("fresh", "late", "num_waiting", "policy")

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.fresh: deque[Ticket] = deque()
        self.late: deque[Ticket] = deque()
        self.num_waiting = 0

    def __iter__(self) -> Iterator[Ticket]:
        for ticket in self.fresh:
            if not ticket.gone:
                yield ticket
        for ticket in self.late:
            if not ticket.gone:
                yield ticket

    def trim(self) -> None:
        """Lets go of tickets that are gone: at the front always, in the middle when they are many."""
        for line in (self.fresh, self.late):
            while line and line[0].gone:
                line.popleft()
        if len(self.fresh) + len(self.late) > 2 * self.num_waiting + 64:
            self.fresh = deque(ticket for ticket in self.fresh if not ticket.gone)
            self.late = deque(ticket for ticket in self.late if not ticket.gone)


class RequestQueue:
    """See module. Iterating gives the waiting tickets in the order of service."""

    def __init__(self, policies: Sequence[QueuePolicy] = (QueuePolicy(),), default_level: int = 0) -> None:
        """`policies` from the most urgent level on; `default_level` is an index into them."""
        self._levels = [_Level(policy) for policy in policies]
        self._default = self._levels[default_level]
        self.num_requests = 0
        self.num_rows = 0
        self.next_timeout_ns = 0
        """No timeout or deadline passes before; 0 is none. May be too early, never too late."""

    def add(self, ticket: Ticket) -> None:
        """Raises Unavailable if the ticket's level is full."""
        request = ticket.request
        priority = request.priority
        level = self._levels[priority - 1] if 0 < priority <= len(self._levels) else self._default
        policy = level.policy
        if 0 < policy.max_queue_size <= level.num_waiting:
            raise Unavailable(
                f"[request id: {request.id or '<id_unknown>'}] Exceeds maximum queue size",
                reason=FailureReason.REJECTED,
            )
        if policy.default_timeout_us:
            ticket.timeout_ns = ticket.queued_ns + 1000 * policy.timeout_us(request.timeout_us)
            self._note(ticket.timeout_ns)
        if request.deadline_ns:
            self._note(request.deadline_ns)
        ticket.level = level
        level.fresh.append(ticket)
        level.num_waiting += 1
        self.num_requests += 1
        self.num_rows += ticket.rows

    def __iter__(self) -> Iterator[Ticket]:
        for level in self._levels:
            if level.num_waiting:
                yield from level

    def take(self, tickets: Iterable[Ticket]) -> None:
        """Removes them: they were cut, cancelled or refused."""
        levels = set()
        for ticket in tickets:
            assert ticket.level is not None, "bug: only queued tickets are taken"
            assert not ticket.gone, "bug: a ticket is taken once"
            ticket.gone = True
            ticket.level.num_waiting -= 1
            levels.add(ticket.level)
            self.num_requests -= 1
            self.num_rows -= ticket.rows
        for level in levels:
            level.trim()

    def cut(self, tickets: Iterable[Ticket]) -> None:
        """Removes them to run."""
        self.take(tickets)

    def finished(self, request: InferRequest) -> None:
        """A request that was cut has its final answer."""

    def expire(self, now_ns: int) -> list[Ticket]:
        """Applies timeouts and deadlines. The tickets returned have left the queue: refuse their requests."""
        if not self.next_timeout_ns or now_ns < self.next_timeout_ns:
            return []
        refused = []
        self.next_timeout_ns = 0
        for level in self._levels:
            for ticket in list(level):
                if 0 < ticket.request.deadline_ns <= now_ns:
                    refused.append(ticket)
                elif 0 < ticket.timeout_ns <= now_ns:
                    if level.policy.delay_late:
                        self._send_back(level, ticket)
                    else:
                        refused.append(ticket)
                if ticket.timeout_ns > now_ns:
                    self._note(ticket.timeout_ns)
                if ticket.request.deadline_ns > now_ns:
                    self._note(ticket.request.deadline_ns)
        self.take(refused)
        return refused

    def _send_back(self, level: _Level, ticket: Ticket) -> None:
        ticket.timeout_ns = 0
        ticket.is_late = True
        level.fresh.remove(ticket)
        level.late.append(ticket)

    def _note(self, when_ns: int) -> None:
        if not self.next_timeout_ns or when_ns < self.next_timeout_ns:
            self.next_timeout_ns = when_ns


def levels_of(batching: ModelDynamicBatching) -> tuple[list[QueuePolicy], int]:
    """The policies from the most urgent level on, and which of them is the default."""
    default_policy = QueuePolicy.of(batching.default_queue_policy)
    if not batching.priority_levels:
        return [default_policy], 0
    own = {level: QueuePolicy.of(policy) for level, policy in batching.priority_queue_policy.items()}
    policies = [own.get(level, default_policy) for level in range(1, batching.priority_levels + 1)]
    return policies, max(batching.default_priority_level, 1) - 1
