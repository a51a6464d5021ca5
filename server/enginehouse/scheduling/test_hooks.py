"""Environment variables that hold requests back, by the names that suites written for Triton set.

Read when a scheduler or front end is built. Without them nothing here has any effect.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field


def _count(name: str) -> int:
    try:
        return max(int(os.environ.get(name, "0")), 0)
    except ValueError:
        return 0


def delay_scheduler() -> int:
    """No batch is started before so many requests were queued, once after loading."""
    return _count("TRITONSERVER_DELAY_SCHEDULER")


def delay_ms(stage: str) -> int:
    """For front ends: TRITONSERVER_DELAY_<stage>, e.g. GRPC_RESPONSE, GRPC_PROCESS, RESPONSE_COMPLETION."""
    return _count(f"TRITONSERVER_DELAY_{stage}")


@dataclass
class SequenceHold:
    """The same for sequences. As Triton counts: `oldest` what each instance's batcher was given, `direct` what
    all slots and the backlog were, cancelled requests included."""

    until_queued: int = 0
    until_backlogged: int = 0
    is_oldest: bool = False
    _num_queued: Counter[int] = field(default_factory=Counter)
    _num_backlogged: int = 0
    is_active: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_active = bool(self.until_queued or self.until_backlogged)

    def fed(self, lane: object) -> None:
        """`oldest`: the batcher of that instance was given a request."""
        if self.is_active:
            self._num_queued[id(lane)] += 1

    def admitted(self, lane: object) -> bool:
        """`direct`: a request came, for an instance or (None) the backlog. True if the hold may be over."""
        if lane is None:
            self._num_backlogged += 1
        elif not self.is_oldest:
            self._num_queued[id(lane)] += 1
        return not self.is_oldest

    def holds(self, lane: object) -> bool:
        if not self.is_active:
            return False
        if self.is_oldest:
            return self._num_queued[id(lane)] < self.until_queued
        num_queued = self._num_queued.total()
        self.is_active = num_queued < self.until_queued or self._num_backlogged < self.until_backlogged
        return self.is_active


def sequence_hold(is_oldest: bool) -> SequenceHold:
    """As the environment says."""
    return SequenceHold(delay_scheduler(), _count("TRITONSERVER_BACKLOG_DELAY_SCHEDULER"), is_oldest)
