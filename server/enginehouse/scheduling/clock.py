"""Time for the schedulers: now, soon, and at a given moment.

Policies get `now_ns` as an argument; only the loops hold a Clock. All times are CLOCK_MONOTONIC nanoseconds.
`testing.clock.ManualClock` is the other implementation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

SPIN_BELOW_NS = 1_000_000
"""uvloop's timers count whole milliseconds; shorter waits look at the time once in every turn of the loop."""


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    def now_ns(self) -> int: ...

    def call_soon(self, callback: Callable[[], None]) -> None:
        """After the callbacks that are ready now, so that what arrived together is seen together."""
        ...

    def call_at(self, when_ns: int, callback: Callable[[], None]) -> Timer:
        """May ring up to half a millisecond early when the wait is longer than one."""
        ...


class LoopClock:
    """The clock of an asyncio loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._loop.call_soon(callback)

    def call_at(self, when_ns: int, callback: Callable[[], None]) -> Timer:
        delay_ns = when_ns - time.monotonic_ns()
        if delay_ns < SPIN_BELOW_NS:
            return _Spin(self._loop, when_ns, callback)
        return self._loop.call_later(delay_ns / 1e9 + 0.0005, callback)


class _Spin:
    def __init__(self, loop: asyncio.AbstractEventLoop, when_ns: int, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._when_ns = when_ns
        self._callback: Callable[[], None] | None = callback
        loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self._callback is None:
            return
        if time.monotonic_ns() < self._when_ns:
            self._loop.call_soon(self._turn)
            return
        callback, self._callback = self._callback, None
        callback()

    def cancel(self) -> None:
        self._callback = None


class Alarm:
    """One pending timer. `ring(now_ns)` gets a time that is never before the one asked for."""

    def __init__(self, clock: Clock, ring: Callable[[int], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._timer: Timer | None = None
        self.when_ns = 0
        """0 while nothing is set."""

    def set(self, when_ns: int) -> None:
        """Replaces what was set; 0 clears."""
        if when_ns == self.when_ns:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.when_ns = when_ns
        if when_ns:
            self._timer = self._clock.call_at(when_ns, self._on_timer)

    def _on_timer(self) -> None:
        now_ns = max(self._clock.now_ns(), self.when_ns)
        self._timer = None
        self.when_ns = 0
        self._ring(now_ns)
