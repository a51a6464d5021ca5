"""What is wrong with a config and where: one error class, one kind of finding, nearest matches.

`ConfigError` stops the reading of a file. A `Problem` is found by the checks of validation.py, which look
at a whole config; its text is the one that Triton's clients know. No I/O here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from enginehouse.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Position:
    """Where something stands; line and column count from 1, 0 is unknown."""

    source: str = ""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.source, self.line, self.column) if part)


class ConfigError(InvalidArgument):
    """A config that can't be read. The text names position, field, what was found and what is allowed."""

    def __init__(
        self,
        what: str,
        position: Position | None = None,
        *,
        field: str = "",
        allowed: str = "",
        nearest: str = "",
    ) -> None:
        self.position = position or Position()
        self.field = field
        self.what = what
        self.allowed = allowed
        self.nearest = nearest
        head = [part for part in (str(self.position), field) if part]
        super().__init__(": ".join([*head, self.text_without_place()]))

    def text_without_place(self) -> str:
        """What was found, what was probably meant and what is allowed."""
        hints = [f"did you mean {self.nearest}?"] if self.nearest else []
        if self.allowed:
            hints.append(f"allowed: {self.allowed}")
        return "; ".join([self.what, *hints])


@dataclass(frozen=True, slots=True)
class Problem:
    """A finding about a config that could be read."""

    text: str
    field: str = ""
    """Path as positions have it: `input[0].dims`."""


def nearest_match(word: str, candidates: Iterable[str]) -> str:
    """The candidate that was probably meant, or ""."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else ""


def shortened(text: str, limit: int = 60) -> str:
    """Quoted for a message, cut where it is long."""
    return f"'{text}'" if len(text) <= limit else f"'{text[:limit]}…'"
