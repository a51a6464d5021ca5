"""How many requests of each step of an ensemble may be in flight, and who waits for that. Pure.

A step that is full holds back what feeds it: an answer counts as taken only when every step that it started has
been let in. Until then a decoupled producer makes no further answers, and a producer of one answer keeps its own
place. A place never waits for anything before it in the graph, so waiting always ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class StepGate:
    """At most `limit` (0: any number) requests of each step at once, over all runs; the others wait."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._num_inside: dict[int, int] = {}
        self._waiting: dict[int, deque[Callable[[], bool]]] = {}

    def num_waiting(self, step: int) -> int:
        return len(self._waiting.get(step, ()))

    def enter(self, step: int, go: Callable[[], bool]) -> None:
        """Calls `go` now or when there is room. If it returns true, `leave` is to follow."""
        if not self.limit:
            go()
        elif self._num_inside.get(step, 0) >= self.limit:
            self._waiting.setdefault(step, deque()).append(go)
        elif go():
            self._num_inside[step] = self._num_inside.get(step, 0) + 1

    def leave(self, step: int) -> None:
        if not self.limit:
            return
        waiting = self._waiting.get(step)
        while waiting:
            if waiting.popleft()():
                return
        self._num_inside[step] -= 1


class Hold:
    """Calls `let_go` once, when all that it was told to wait for has been released."""

    __slots__ = ("_let_go", "_num_awaited")

    def __init__(self, let_go: Callable[[], None]) -> None:
        self._let_go = let_go
        self._num_awaited = 1
        """One for whoever made it."""

    def wait_for_one_more(self) -> None:
        self._num_awaited += 1

    def release(self) -> None:
        self._num_awaited -= 1
        if not self._num_awaited:
            self._let_go()
