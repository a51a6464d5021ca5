"""Which sequences exist, which slot each holds, and who waits for one. Pure: no clock, no I/O.

A sequence starts with its first request (START), holds a slot of one instance until its last one (END) is
done, and waits in the backlog while all slots are taken. It also ends when a waiting request of it is
cancelled, or when it is idle for too long.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Protocol

from enginehouse.errors import InvalidArgument
from enginehouse.scheduling.queue import Ticket
from enginehouse.types import CorrelationId, InferRequest, Tensor


class Lane(Protocol):
    """The slots of one instance."""

    index: int
    is_retired: bool
    """Its slots are not given out any more."""


class SequenceRun:
    """One sequence from its START on. `lane` and `slot` are None and -1 in the backlog."""

    __slots__ = (
        "correlation_id", "expires_ns", "is_closed", "is_running", "lane", "last_active_ns", "runs_on", "slot",
        "states", "waiting",
    )  # fmt: skip

    def __init__(self, correlation_id: CorrelationId) -> None:
        self.correlation_id = correlation_id
        self.lane: Lane | None = None
        self.slot = -1
        self.waiting: deque[Ticket] = deque()
        self.runs_on: Lane | None = None
        """Where its latest request was sent; stays when the sequence gives up its slot."""
        self.is_running = False
        """A request of it is with its instance, or on the way there."""
        self.is_closed = False
        """No further request belongs to it: it ends when those that it has are done."""
        self.last_active_ns = 0
        self.expires_ns = 0
        """When it leaves the backlog unserved; 0 is never."""
        self.states: dict[str, Tensor] = {}

    @property
    def is_over(self) -> bool:
        return self.is_closed and not self.is_running and not self.waiting


class SequenceBook:
    """See module."""

    def __init__(self, model_name: str, max_idle_ns: int) -> None:
        self._model_name = model_name
        self._max_idle_ns = max_idle_ns
        self._open: dict[CorrelationId, SequenceRun] = {}
        self._by_activity: dict[SequenceRun, None] = {}
        """Every sequence that exists, the one that was active longest ago first."""
        self._free: list[tuple[int, int, Lane]] = []
        self.backlog: deque[SequenceRun] = deque()
        self.next_expiry_ns = 0
        """No sequence of the backlog expires before; 0 is never. May be too early, never too late."""

    # --- slots

    def add_slots(self, lane: Lane, num_slots: int) -> None:
        """Low slots are given out first, over all lanes, so that batches stay dense."""
        for slot in range(num_slots):
            heapq.heappush(self._free, (slot, lane.index, lane))

    def retire(self, lane: Lane) -> None:
        """The lane's free slots are given out no more; those in use are forgotten when released."""
        lane.is_retired = True
        self._free = [entry for entry in self._free if entry[2] is not lane]
        heapq.heapify(self._free)

    def sequences_of(self, lane: Lane) -> list[SequenceRun]:
        return [sequence for sequence in self._by_activity if sequence.lane is lane]

    @property
    def sequences(self) -> list[SequenceRun]:
        return list(self._by_activity)

    # --- requests

    def admit(self, request: InferRequest, ticket: Ticket, now_ns: int) -> SequenceRun:
        """The sequence that the request now waits in, with a slot or in the backlog.

        Raises InvalidArgument if there is no such sequence.
        """
        correlation_id = request.correlation_id
        sequence = self._open.get(correlation_id)
        if sequence is None:
            if not request.sequence_start:
                raise InvalidArgument(
                    f"inference request for sequence {correlation_id} to model '{self._model_name}' must "
                    f"specify the START flag on the first request of the sequence"
                )
            sequence = self._open[correlation_id] = self.begin(correlation_id)
        sequence.waiting.append(ticket)
        self.touch(sequence, now_ns)
        if sequence.lane is None and request.timeout_us:
            expires_ns = now_ns + 1000 * request.timeout_us
            sequence.expires_ns = min(sequence.expires_ns or expires_ns, expires_ns)
            self._note_expiry(sequence.expires_ns)
        if request.sequence_end:
            self.close(sequence)
        return sequence

    def begin(self, correlation_id: CorrelationId) -> SequenceRun:
        """A new sequence, with a slot if one is free."""
        sequence = SequenceRun(correlation_id)
        if self._free:
            sequence.slot, _, sequence.lane = heapq.heappop(self._free)
        else:
            self.backlog.append(sequence)
        return sequence

    def touch(self, sequence: SequenceRun, now_ns: int) -> None:
        sequence.last_active_ns = now_ns
        self._by_activity.pop(sequence, None)
        self._by_activity[sequence] = None

    def close(self, sequence: SequenceRun) -> None:
        """Later requests with its id start anew."""
        sequence.is_closed = True
        if self._open.get(sequence.correlation_id) is sequence:
            del self._open[sequence.correlation_id]

    # --- ends

    def finish(self, sequence: SequenceRun) -> SequenceRun | None:
        """Takes the sequence out. The next one from the backlog, which has its slot now, or None."""
        self.close(sequence)
        self._by_activity.pop(sequence, None)
        if sequence.lane is None:
            self.backlog.remove(sequence)
            return None
        lane, slot = sequence.lane, sequence.slot
        sequence.lane, sequence.slot = None, -1
        return self._give(lane, slot)

    def _give(self, lane: Lane, slot: int) -> SequenceRun | None:
        """The slot is free: the sequence that gets it at once, or None."""
        if lane.is_retired:
            return None
        if self.backlog:
            following = self.backlog.popleft()
            following.lane, following.slot, following.expires_ns = lane, slot, 0
            return following
        heapq.heappush(self._free, (slot, lane.index, lane))
        return None

    def fill(self) -> list[SequenceRun]:
        """Sequences of the backlog that get the slots which were added."""
        placed = []
        while self.backlog and self._free:
            slot, _, lane = heapq.heappop(self._free)
            following = self._give(lane, slot)
            if following is not None:
                placed.append(following)
        return placed

    # --- time

    @property
    def next_idle_ns(self) -> int:
        """No sequence is idle for too long before; 0 if there is none. May be too early."""
        first = next(iter(self._by_activity), None)
        return first.last_active_ns + self._max_idle_ns if first is not None else 0

    def idle(self, now_ns: int) -> list[SequenceRun]:
        """Sequences to finish: open, with nothing to do, for longer than allowed."""
        found = []
        while (first := next(iter(self._by_activity), None)) is not None:
            if now_ns < first.last_active_ns + self._max_idle_ns:
                break
            if first.is_running or first.waiting:
                self.touch(first, now_ns)  # it waits for us, not we for it
            else:
                del self._by_activity[first]
                found.append(first)
        return found

    def expired(self, now_ns: int) -> list[SequenceRun]:
        """Sequences that waited in the backlog for longer than their requests allow."""
        if not 0 < self.next_expiry_ns <= now_ns:
            return []
        self.next_expiry_ns = 0
        found = []
        for sequence in self.backlog:
            if 0 < sequence.expires_ns <= now_ns:
                found.append(sequence)
            elif sequence.expires_ns:
                self._note_expiry(sequence.expires_ns)
        return found

    def _note_expiry(self, expires_ns: int) -> None:
        if not 0 < self.next_expiry_ns < expires_ns:
            self.next_expiry_ns = expires_ns
