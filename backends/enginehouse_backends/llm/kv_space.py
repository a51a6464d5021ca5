"""The blocks of several LLMs over one arena: hands pages to pools as load moves.

Pure. One per engine. A page without live blocks moves at once (its prefixes are forgotten); a page in use
moves only to a model that is under its guaranteed share, after its owner has emptied it.
"""

from __future__ import annotations

from enginehouse_backends.llm.block_pool import BlockPool
from enginehouse_backends.llm.page_ledger import Donor, PageLedger


class KvSpace:
    """See module. `now` is the engine's step counter."""

    def __init__(self, ledger: PageLedger) -> None:
        self.ledger = ledger
        self._pools: dict[str, BlockPool] = {}
        self.num_moved_pages = 0

    def join(self, name: str, pool: BlockPool, weight: float = 1.0) -> None:
        self.ledger.join(name, weight)
        self._pools[name] = pool

    def leave(self, name: str) -> None:
        """Its generations must be gone."""
        self.vacate(name)
        del self._pools[name]
        self.ledger.leave(name)

    def vacate(self, name: str) -> None:
        """The model holds no page any more, and no prefix. None of its generations may hold a block."""
        pool = self._pools[name]
        for page in list(pool.pages):
            pool.remove_page(page)
            self.ledger.give_back(page)

    def num_available(self, name: str) -> int:
        """Blocks that the model can get without anyone's work being undone."""
        pool = self._pools[name]
        pages = self.ledger.num_free
        for donor, other in self._pools.items():
            if donor != name:
                pages += other.num_idle_pages
        return pool.num_free + pages * pool.blocks_per_page

    def guaranteed_blocks(self, name: str) -> int:
        """Blocks that the model can always have, whatever the others do."""
        return self.ledger.share(name) * self._pools[name].blocks_per_page

    def extend(self, name: str, now: int) -> bool:
        """Gives the model a page if one is free, or idle elsewhere for longer than its own oldest prefix."""
        pool = self._pools[name]
        page = self.ledger.take_free(name)
        if page is None and self._take_idle(name, older_than=pool.oldest_cached_use):
            page = self.ledger.take_free(name)
        if page is None:
            return False
        pool.add_page(page, now)
        return True

    def busy_donor(self, name: str) -> str | None:
        """Which model has to empty one of its pages now, because this one is under its share."""
        return self.ledger.choose_busy_donor(name, [other for other in self._pools if other != name])

    def give_up(self, name: str, page: int) -> None:
        """A model has emptied a page: it is free for the asker."""
        self._pools[name].remove_page(page)
        self.ledger.give_back(page)
        self.num_moved_pages += 1

    def check_integrity(self) -> None:
        self.ledger.check_integrity()
        for name, pool in self._pools.items():
            pool.check_integrity()
            assert all(self.ledger.owner(page) == name for page in pool.pages), f"bug: {name} uses another's page"
            assert self.ledger.count(name) == sum(1 for _ in pool.pages), f"bug: {name} lost a page"

    def _take_idle(self, name: str, older_than: int | None) -> bool:
        if len(self._pools) == 1:
            return False
        donors = []
        for other, pool in self._pools.items():
            idle = pool.oldest_idle_page() if other != name else None
            if idle is not None:
                donors.append(Donor(other, idle[0], idle[1]))
        donor = self.ledger.choose_idle_donor(donors, older_than)
        if donor is None or donor.oldest_idle_page is None:
            return False
        self.give_up(donor.owner, donor.oldest_idle_page)
        return True
