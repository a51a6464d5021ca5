"""A clock that stands still until a test moves it."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable


class ManualTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """Implements `scheduling.clock.Clock`. Time starts at one second and moves only in `advance`."""

    def __init__(self) -> None:
        self._now_ns = 1_000_000_000
        self._soon: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[int, int, ManualTimer]] = []
        self._num_timers = 0

    def now_ns(self) -> int:
        return self._now_ns

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def call_at(self, when_ns: int, callback: Callable[[], None]) -> ManualTimer:
        timer = ManualTimer(callback)
        self._num_timers += 1
        heapq.heappush(self._timers, (when_ns, self._num_timers, timer))
        return timer

    def run_soon(self) -> None:
        """Runs everything that was to be called soon, and what that asks for in turn."""
        while self._soon:
            self._soon.popleft()()

    def advance(self, *, us: float = 0, ms: float = 0, s: float = 0) -> None:
        """Moves time, ringing timers in order on the way."""
        self.run_soon()
        end_ns = self._now_ns + round(1e3 * us + 1e6 * ms + 1e9 * s)
        while self._timers and self._timers[0][0] <= end_ns:
            when_ns, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                self._now_ns = max(self._now_ns, when_ns)
                timer.callback()
                self.run_soon()
        self._now_ns = end_ns

    @property
    def num_timers(self) -> int:
        """Timers that would still ring."""
        return sum(timer.callback is not None for _, _, timer in self._timers)
