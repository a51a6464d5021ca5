"""Which blocks of a model's KV memory are in use, which are free, and which free ones still hold a prefix.

Pure: no tensors, clock or lock. A block is live (referenced), cached (free, but found by its hash until it is
taken), or empty. Blocks come and go in pages of the arena. The hash of a block covers everything before it
too (chained), so that equal hashes mean equal keys and values.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BlockHash = bytes
"""16 bytes of BLAKE2b: no one can craft a prompt that hits another's blocks."""


def root_hash(model: str, adapter: str = "", salt: str = "") -> BlockHash:
    """Where a chain starts: nothing is shared across models, adapters or salts."""
    return hashlib.blake2b(f"{model}\0{adapter}\0{salt}".encode(), digest_size=16).digest()


def chain_hash(previous: BlockHash, tokens: array[int]) -> BlockHash:
    """The hash of the block with these tokens after the block with hash `previous`."""
    return hashlib.blake2b(previous + tokens.tobytes(), digest_size=16).digest()


class BlockPool:
    """See module. `now` of all methods is the engine's step counter."""

    def __init__(self, blocks_per_page: int) -> None:
        self.blocks_per_page = blocks_per_page
        self._references: dict[int, int] = {}
        """By block: every block of every page that is here."""
        self._empty: list[int] = []
        """A heap: low pages fill first, so that high ones drain. May hold blocks that have gone."""
        self._is_empty: set[int] = set()
        self._cached: OrderedDict[int, int] = OrderedDict()
        """Free blocks with a hash, by when they were last used, oldest first."""
        self._block_by_hash: dict[BlockHash, int] = {}
        self._hash_by_block: dict[int, BlockHash] = {}
        self._live_by_page: dict[int, int] = {}
        self._used_by_page: dict[int, int] = {}
        self._num_idle_pages = 0

    # --- size
    @property
    def num_blocks(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated: empty ones and cached ones."""
        return len(self._is_empty) + len(self._cached)

    @property
    def num_empty(self) -> int:
        return len(self._is_empty)

    @property
    def num_live(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def pages(self) -> Iterable[int]:
        return self._live_by_page.keys()

    @property
    def oldest_cached_use(self) -> int | None:
        """When the block that would be evicted next was last used; None if none is cached."""
        return next(iter(self._cached.values()), None)

    @property
    def num_idle_pages(self) -> int:
        """Pages without live blocks."""
        return self._num_idle_pages

    # --- pages
    def add_page(self, page: int, now: int) -> None:
        assert page not in self._live_by_page, f"bug: page {page} is here already"
        self._live_by_page[page] = 0
        self._num_idle_pages += 1
        self._used_by_page[page] = now
        for block in self._blocks_of(page):
            self._references[block] = 0
            self._put_empty(block)

    def remove_page(self, page: int) -> None:
        """Forgets a page without live blocks, and the prefixes it held."""
        assert self._live_by_page[page] == 0, f"bug: page {page} has live blocks"
        for block in self._blocks_of(page):
            self._forget_hash(block)
            self._cached.pop(block, None)
            self._is_empty.discard(block)
            del self._references[block]
        del self._live_by_page[page], self._used_by_page[page]
        self._num_idle_pages -= 1

    def oldest_idle_page(self) -> tuple[int, int] | None:
        """(page, when it was last used) of the page without live blocks that was unused for longest."""
        idle = [(self._used_by_page[page], page) for page, live in self._live_by_page.items() if live == 0]
        if not idle:
            return None
        used, page = min(idle)
        return page, used

    def emptiest_page(self) -> int | None:
        """The page with the fewest live blocks: the cheapest to empty."""
        return min(self._live_by_page, key=lambda page: self._live_by_page[page], default=None)

    def live_blocks_of(self, page: int) -> list[int]:
        return [block for block in self._blocks_of(page) if self._references[block] > 0]

    # --- blocks
    def allocate(self, now: int, avoid_page: int | None = None) -> int | None:
        """A block with one reference: an empty one, else the cached one that was unused for longest."""
        block = self._take_empty(avoid_page)
        if block is None:
            block = self._evict(avoid_page)
        if block is not None:
            self._references[block] = 1
            self._mark_live(block, now)
        return block

    def retain(self, block: int, now: int) -> None:
        """One reference more; a cached block becomes live again."""
        if self._references[block] == 0:
            self._cached.pop(block)
            self._mark_live(block, now)
        self._references[block] += 1

    def release(self, blocks: Sequence[int], now: int) -> None:
        """One reference less each. Free ones with a hash stay findable, the last of the list go first."""
        for block in reversed(blocks):
            left = self._references[block] - 1
            assert left >= 0, f"bug: block {block} is released more often than held"
            self._references[block] = left
            if left:
                continue
            self._mark_free(block, now)
            if block in self._hash_by_block:
                self._cached[block] = now
            else:
                self._put_empty(block)

    def references(self, block: int) -> int:
        return self._references[block]

    # --- prefixes
    def find(self, block_hash: BlockHash) -> int | None:
        return self._block_by_hash.get(block_hash)

    def register(self, block: int, block_hash: BlockHash) -> bool:
        """Makes a live block findable. False if another block has that content already."""
        assert self._references[block] > 0, f"bug: block {block} is registered while free"
        if block_hash in self._block_by_hash:
            return False
        self._forget_hash(block)
        self._block_by_hash[block_hash] = block
        self._hash_by_block[block] = block_hash
        return True

    def unregister(self, block: int) -> None:
        """Its content is not what its hash says (a step failed). Live or free."""
        self._forget_hash(block)
        if self._cached.pop(block, None) is not None:
            self._put_empty(block)

    def move_identity(self, source: int, target: int) -> None:
        """After a live block's content was copied to a newly allocated one: references and hash follow."""
        assert self._references[target] == 1, f"bug: block {target} is no fresh target"
        self._references[target] = self._references[source]
        self._references[source] = 0
        block_hash = self._hash_by_block.get(source)
        self._forget_hash(source)
        if block_hash is not None:
            self._block_by_hash[block_hash] = target
            self._hash_by_block[target] = block_hash
        self._mark_free(source, self._used_by_page[source // self.blocks_per_page])
        self._put_empty(source)

    def drop_cached(self) -> int:
        """Forgets every prefix that nobody uses. Gives how many."""
        blocks = list(self._cached)
        for block in blocks:
            self.unregister(block)
        return len(blocks)

    def check_integrity(self) -> None:
        """Raises AssertionError if a block is lost, doubled or miscounted. Costs a walk over all blocks."""
        free = self._is_empty | self._cached.keys()
        assert not self._is_empty & self._cached.keys(), "bug: a block is both empty and cached"
        assert free == {block for block, count in self._references.items() if count == 0}, (
            "bug: a free block is lost, or a live one is on a free list"
        )
        assert self._is_empty <= set(self._empty), "bug: an empty block can't be allocated"
        assert self._cached.keys() <= self._hash_by_block.keys(), "bug: a cached block has no hash"
        assert not self._is_empty & self._hash_by_block.keys(), "bug: an empty block has a hash"
        assert {block: key for key, block in self._block_by_hash.items()} == self._hash_by_block, (
            "bug: hashes and blocks disagree"
        )
        for page, live in self._live_by_page.items():
            assert live == len(self.live_blocks_of(page)), f"bug: page {page} miscounts its live blocks"
        idle = sum(1 for live in self._live_by_page.values() if live == 0)
        assert idle == self._num_idle_pages, "bug: idle pages are miscounted"
        assert self.num_blocks == len(self._live_by_page) * self.blocks_per_page, "bug: a page lacks blocks"

    # --- inside
    def _blocks_of(self, page: int) -> range:
        return range(page * self.blocks_per_page, (page + 1) * self.blocks_per_page)

    def _mark_live(self, block: int, now: int) -> None:
        page = block // self.blocks_per_page
        self._num_idle_pages -= self._live_by_page[page] == 0
        self._live_by_page[page] += 1
        self._used_by_page[page] = now

    def _mark_free(self, block: int, now: int) -> None:
        page = block // self.blocks_per_page
        self._live_by_page[page] -= 1
        self._num_idle_pages += self._live_by_page[page] == 0
        self._used_by_page[page] = now

    def _put_empty(self, block: int) -> None:
        self._is_empty.add(block)
        heapq.heappush(self._empty, block)

    def _take_empty(self, avoid_page: int | None) -> int | None:
        skipped: list[int] = []
        taken: int | None = None
        while self._empty and taken is None:
            block = heapq.heappop(self._empty)
            if block not in self._is_empty:
                continue  # its page has gone, or it lay here twice
            if avoid_page is not None and block // self.blocks_per_page == avoid_page:
                skipped.append(block)
                continue
            self._is_empty.discard(block)
            taken = block
        for block in skipped:
            heapq.heappush(self._empty, block)
        return taken

    def _evict(self, avoid_page: int | None) -> int | None:
        for block in self._cached:
            if avoid_page is None or block // self.blocks_per_page != avoid_page:
                del self._cached[block]
                self._forget_hash(block)
                return block
        return None

    def _forget_hash(self, block: int) -> None:
        block_hash = self._hash_by_block.pop(block, None)
        if block_hash is not None:
            del self._block_by_hash[block_hash]
