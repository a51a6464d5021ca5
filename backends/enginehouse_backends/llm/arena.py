"""The memory behind the pages: one tensor of equal pages that all LLMs of an engine use.

A model's blocks lie one behind the other inside its pages; a block's place is its offset in PLACE_BYTES.
On a CPU the tensor is reserved address space that becomes memory page by page, so it can grow with each model. On a
GPU it is allocated anew when models come or go, and everything in it is computed again.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Callable

import numpy as np
import torch

from enginehouse.errors import ResourceExhausted
from enginehouse_backends.llm.attention import PLACE_BYTES
from enginehouse_backends.llm.runner import IntArray

MIB = 1 << 20
DEFAULT_PAGE_BYTES = 4 * MIB
DEVICE_PAGE_BYTES = 32 * MIB
"""A GPU's models have larger blocks, and more memory."""
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Older Pythons don't name it."""
_TOUCHING_NICENESS = 10


class Arena:
    """`memory`: flat uint8 tensor of all pages."""

    keeps_content = True
    """Whether it grows in place. If not, nothing may use it while `resize` runs."""

    def __init__(self, memory: torch.Tensor, page_bytes: int, num_pages: int) -> None:
        assert page_bytes % PLACE_BYTES == 0, "bug: pages must hold whole places"
        self.memory, self.page_bytes, self.num_pages = memory, page_bytes, num_pages

    @property
    def most_pages(self) -> int:
        """Pages that the address space has room for."""
        return self.memory.numel() // self.page_bytes

    def blocks_per_page(self, block_bytes: int) -> int:
        """Raises ResourceExhausted if not even one fits."""
        if block_bytes > self.page_bytes:
            raise ResourceExhausted(
                f"a KV block of {block_bytes} bytes doesn't fit into an arena page of {self.page_bytes} bytes"
            )
        return self.page_bytes // block_bytes

    def places(self, blocks: IntArray, block_bytes: int) -> IntArray:
        """Where blocks of that size start."""
        pages, index = np.divmod(blocks.astype(np.int64), self.blocks_per_page(block_bytes))
        offsets = pages * self.page_bytes + index * block_bytes
        places: IntArray = (offsets // PLACE_BYTES).astype(np.int32)
        return places

    def prepare(self, num_pages: int) -> None:
        """Fills the pages that `grow` will add with zeros: the first touch of memory is slow. By one thread at a
        time, while the engine uses the pages that are there already; it gives way to the engine.
        """
        assert num_pages <= self.most_pages, "bug: the arena's address space is smaller than that"
        toucher = threading.Thread(target=self._touch, args=(range(self.num_pages, num_pages),), name="arena pages")
        toucher.start()
        toucher.join()

    def _touch(self, pages: range) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _TOUCHING_NICENESS)  # of this thread alone
        for page in pages:
            self.memory[page * self.page_bytes : (page + 1) * self.page_bytes].numpy().fill(0)  # by this thread

    def grow(self, num_pages: int) -> None:
        """More pages, in place."""
        self.num_pages = max(self.num_pages, num_pages)


class DeviceArena(Arena):
    """On a GPU. `allocate` gives zeroed memory there, `release` gives what is unused back to the driver."""

    keeps_content = False

    def __init__(
        self,
        allocate: Callable[[int], torch.Tensor],
        release: Callable[[], None],
        page_bytes: int = DEVICE_PAGE_BYTES,
    ) -> None:
        super().__init__(allocate(0), page_bytes, 0)
        self._allocate, self._release = allocate, release

    def prepare(self, num_pages: int) -> None:
        """Nothing: the memory comes with `resize`."""

    def resize(self, num_pages: int) -> None:
        """Other memory, all zeros. Nobody may hold the old one. Raises ResourceExhausted and is empty then."""
        self.memory, self.num_pages = self._allocate(0), 0
        self._release()
        self.memory = self._allocate(num_pages * self.page_bytes)
        self.num_pages = num_pages


def reserve_host_arena(most_bytes: int, page_bytes: int = DEFAULT_PAGE_BYTES) -> Arena:
    """An arena without pages yet that can grow to `most_bytes` of host memory."""
    most_bytes -= most_bytes % page_bytes
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    region = mmap.mmap(-1, most_bytes + page_bytes, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(region, dtype=torch.uint8)
    skip = -memory.data_ptr() % page_bytes  # whole huge pages
    return Arena(memory[skip : skip + most_bytes], page_bytes, 0)
