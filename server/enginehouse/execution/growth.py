"""What the slabs of one worker have grown by, as the ledger has it. On the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

GiveBack: TypeAlias = Callable[[], None]
BookGrowth: TypeAlias = Callable[[int], GiveBack]
"""Raises ResourceExhausted if there may not be so many bytes more."""


def not_booked(num_bytes: int) -> GiveBack:
    """BookGrowth for a process whose bytes nobody counts."""
    return lambda: None


class Growth:
    """See module."""

    def __init__(self, book: BookGrowth) -> None:
        self._book = book
        self._booked: list[GiveBack] = []

    @contextmanager
    def of(self, num_bytes: int) -> Iterator[None]:
        """Booked until `end`, unless what makes the memory raises. Raises ResourceExhausted."""
        give_back = self._book(num_bytes)
        self._booked.append(give_back)
        try:
            yield
        except BaseException:
            if give_back in self._booked:  # the worker may have ended meanwhile
                self._booked.remove(give_back)
                give_back()
            raise

    def end(self) -> None:
        """The worker has ended, and its memory with it."""
        booked, self._booked = self._booked, []
        for give_back in booked:
            give_back()
