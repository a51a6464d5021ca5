"""Which model owns which page of the arena, and from whom a page is taken when none is free.

Pure bookkeeping: the memory is arena.py's, a page's blocks are block_pool.py's.

A model is guaranteed its share of the pages (by weight); beyond it pages go to whoever asks, and come back
when a model under its share needs them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Donor:
    """What a model could give: read from its pool when a page is wanted."""

    owner: str
    oldest_idle_page: int | None
    """A page without live blocks, the one unused for longest."""
    idle_since: int
    """When that page was last used (step clock)."""


@dataclass(slots=True)
class PageLedger:
    """Pages 0 … num_pages - 1; `grow` adds more at the end."""

    num_pages: int
    weights: dict[str, float] = field(default_factory=dict)
    _owner_by_page: dict[int, str] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)
    _counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free = list(range(self.num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count(self, owner: str) -> int:
        return self._counts.get(owner, 0)

    def owner(self, page: int) -> str | None:
        return self._owner_by_page.get(page)

    def join(self, owner: str, weight: float = 1.0) -> None:
        assert owner not in self.weights, f"bug: {owner} has joined already"
        self.weights[owner] = weight
        self._counts[owner] = 0

    def leave(self, owner: str) -> None:
        """Frees all its pages; its blocks must be gone."""
        for page in [page for page, holder in self._owner_by_page.items() if holder == owner]:
            self.give_back(page)
        del self.weights[owner], self._counts[owner]

    def grow(self, num_pages: int) -> None:
        for page in range(self.num_pages, num_pages):
            heapq.heappush(self._free, page)
        self.num_pages = max(self.num_pages, num_pages)

    def resize(self, num_pages: int) -> None:
        """Any number, while nobody owns a page."""
        assert not self._owner_by_page, "bug: pages are counted anew while some are owned"
        self.num_pages, self._free = num_pages, list(range(num_pages))

    def share(self, owner: str) -> int:
        """Pages that the owner can always get back."""
        return int(self.num_pages * self.weights[owner] / sum(self.weights.values()))

    def take_free(self, owner: str) -> int | None:
        """The lowest free page, now the owner's."""
        if not self._free:
            return None
        page = heapq.heappop(self._free)
        self._owner_by_page[page] = owner
        self._counts[owner] += 1
        return page

    def give_back(self, page: int) -> None:
        owner = self._owner_by_page.pop(page)
        self._counts[owner] -= 1
        heapq.heappush(self._free, page)

    def choose_idle_donor(self, donors: Sequence[Donor], older_than: int | None) -> Donor | None:
        """Whose idle page to take: the coldest one, if it is colder than the asker's own (`older_than`)."""
        idle = [donor for donor in donors if donor.oldest_idle_page is not None]
        coldest = min(idle, key=lambda donor: donor.idle_since, default=None)
        if coldest is None or (older_than is not None and coldest.idle_since >= older_than):
            return None
        return coldest

    def choose_busy_donor(self, asker: str, donors: Sequence[str]) -> str | None:
        """Who must empty a page in use: the one furthest above its share, while the asker is under its own."""
        if self.count(asker) >= self.share(asker):
            return None
        above = {owner: self.count(owner) - self.share(owner) for owner in donors}
        richest = max(above, key=lambda owner: above[owner], default=None)
        return richest if richest is not None and above[richest] > 0 else None

    def check_integrity(self) -> None:
        """Raises AssertionError if a page is lost, doubled or miscounted."""
        pages = sorted([*self._free, *self._owner_by_page])
        assert pages == list(range(self.num_pages)), "bug: a page is lost or both free and owned"
        for owner, count in self._counts.items():
            held = sum(1 for holder in self._owner_by_page.values() if holder == owner)
            assert held == count, f"bug: {owner} holds {held} pages and is said to hold {count}"
