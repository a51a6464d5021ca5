"""How far a model may be ahead of whoever reads its answers: the instance's side of `InferRequest.max_ahead`.

Pure counting; a host decides how its thread waits until there is room. Answers are numbered when they are made,
so that any number of the model's threads may send at once.
"""

from __future__ import annotations

import itertools


class AnswerWindow:
    """Of one request. `size` 0 is open from the start."""

    __slots__ = ("_is_open", "_num_taken", "_numbers", "_size")

    def __init__(self, size: int) -> None:
        self._size = size
        self._numbers = itertools.count(1)
        self._num_taken = 0
        self._is_open = not size

    @property
    def is_open(self) -> bool:
        """Nobody need wait."""
        return self._is_open

    def next_number(self) -> int:
        """Of the answer that is about to be sent."""
        return next(self._numbers)

    def has_room(self, number: int) -> bool:
        return self._is_open or number <= self._num_taken + self._size

    def take(self, num_taken: int) -> None:
        """So many answers were taken since the first."""
        self._num_taken = max(self._num_taken, num_taken)

    def open(self) -> None:
        """For good: the request is cancelled or over."""
        self._is_open = True
