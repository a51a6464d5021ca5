"""Finds stop strings in text that comes in pieces, and holds back what may turn out to be the start of one.

Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class StopStrings:
    """`stops` are not empty. After `push` has found one, nothing more may be pushed."""

    stops: Sequence[str]
    include: bool = False
    """Whether the found string itself is given out."""
    found: str | None = None
    _held: str = ""

    def push(self, text: str, may_stop: bool = True) -> str:
        """The text that can be given out now. Sets `found`, unless the generation may not stop yet."""
        if not self.stops:
            return text
        held = self._held + text
        first = self._find(held) if may_stop else None
        if first is not None:
            at, self.found = first
            self._held = ""
            return held[: at + len(self.found)] if self.include else held[:at]
        keep = self._num_open(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back for nothing."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, str] | None:
        """The one that is complete first, whatever pieces the text came in; of two, the longer."""
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        return min(found, key=lambda item: (item[0] + len(item[1]), item[0]), default=None)

    def _num_open(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max(map(len, self.stops)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self.stops):
                return length
        return 0
