"""Memory that the server and a worker share: sealed memfd segments, blocks in them, and who may reuse them.

Each direction has a slab of its own, and only its writer allocates, so no lock crosses the process border.
A reader's block goes back to the writer when the last view of it is gone; a model that keeps its input
merely delays that. Nothing is left behind when either side is killed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections import deque
from typing import Any, TypeAlias

import numpy as np

from enginehouse.types import Array

ALIGNMENT = 64
MIN_SEGMENT_BYTES = 1 << 20
NO_BLOCK = -1
_OFFSET_BITS = 44
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1


def block_bytes(nbytes: int) -> int:
    """What a block of that size takes: a power of two, at least one cache line."""
    return max(ALIGNMENT, 1 << (nbytes - 1).bit_length())


def aligned(nbytes: int) -> int:
    """The size that keeps the next tensor of a block on a cache line of its own."""
    return (nbytes + ALIGNMENT - 1) & ~(ALIGNMENT - 1)


class Allocator:
    """Pure: which blocks of which segments are free. A block's key holds segment and offset.

    Free lists by size; buddies are joined only when an allocation finds nothing, so the usual path is a
    pop and an append.
    """

    def __init__(self) -> None:
        self.segment_bytes: list[int] = []
        self._free: dict[int, list[int]] = {}
        self._live: dict[int, int] = {}

    @property
    def num_live(self) -> int:
        return len(self._live)

    def add_segment(self, nbytes: int) -> int:
        """`nbytes` is a power of two. Returns the segment's index."""
        assert nbytes == block_bytes(nbytes), "a segment is one big block"
        index = len(self.segment_bytes)
        self.segment_bytes.append(nbytes)
        self._free.setdefault(nbytes, []).append(index << _OFFSET_BITS)
        return index

    def allocate(self, nbytes: int) -> int:
        """The block's key, or NO_BLOCK if no segment has room."""
        size = block_bytes(nbytes)
        free = self._free.get(size)
        key = free.pop() if free else self._split(size)
        if key == NO_BLOCK and self._join_buddies():
            key = self._split(size)
        if key != NO_BLOCK:
            self._live[key] = size
        return key

    def free(self, key: int) -> None:
        """Raises KeyError for a block that is not out: a bug of the other side."""
        self._free.setdefault(self._live.pop(key), []).append(key)

    def _split(self, size: int) -> int:
        larger = min((s for s, keys in self._free.items() if s >= size and keys), default=0)
        if not larger:
            return NO_BLOCK
        key = self._free[larger].pop()
        while larger > size:
            larger //= 2
            self._free.setdefault(larger, []).append(key + larger)
        return key

    def _join_buddies(self) -> bool:
        """Whether anything was joined."""
        joined = False
        for size in sorted(self._free):
            keys = set(self._free[size])
            while keys:
                key = keys.pop()
                buddy = key ^ size
                if buddy in keys and size < self.segment_bytes[key >> _OFFSET_BITS]:
                    keys.discard(buddy)
                    self._free[size].remove(key)
                    self._free[size].remove(buddy)
                    self._free.setdefault(size * 2, []).append(min(key, buddy))
                    joined = True
        return joined and (self._join_buddies() or True)

    def check_integrity(self) -> None:
        """Free and live blocks fill every segment exactly once."""
        blocks = [(key, size) for size, keys in self._free.items() for key in keys] + list(self._live.items())
        covered: dict[int, int] = dict.fromkeys(range(len(self.segment_bytes)), 0)
        end_of_last = -1
        for key, size in sorted(blocks):
            assert key >= end_of_last, "blocks overlap"
            end_of_last = key + size
            covered[key >> _OFFSET_BITS] += size
        assert list(covered.values()) == self.segment_bytes, "bytes were lost"


def make_segment(name: str, nbytes: int) -> int:
    """A new memfd of that size, allocated and sealed against resizing. The caller closes it.

    Blocks for about 0.3 ms a MiB. Raises OSError (ENOMEM, EMFILE) when there is none to be had.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Segment:
    """One mapped segment. Its memory goes when the last view does."""

    def __init__(self, fd: int, nbytes: int) -> None:
        populate = getattr(mmap, "MAP_POPULATE", 0)
        self.map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | populate)
        self.nbytes = nbytes
        self.memory = memoryview(self.map)
        self.source = self.memory
        """What readers' views are made of."""


def make_shared_segment(of_worker: bool, nbytes: int) -> tuple[int, Segment]:
    """A segment that this process has mapped, and the descriptor for the other one. As `make_segment`."""
    size = max(nbytes, MIN_SEGMENT_BYTES)
    fd = make_segment(f"enginehouse-{'outputs' if of_worker else 'inputs'}", size)
    return fd, Segment(fd, size)


FirstSegments: TypeAlias = tuple[tuple[int, Segment], tuple[int, Segment]]
"""Of the server's slab and of the worker's."""


def first_segments(nbytes: int) -> FirstSegments:
    size = block_bytes(max(nbytes, MIN_SEGMENT_BYTES))
    ours = make_shared_segment(False, size)
    try:
        return ours, make_shared_segment(True, size)
    except BaseException:
        os.close(ours[0])
        raise


class WriterSlab:
    """This process's side of the slab that it writes into."""

    def __init__(self) -> None:
        self.allocator = Allocator()
        self._segments: list[Segment] = []

    @property
    def total_bytes(self) -> int:
        return sum(segment.nbytes for segment in self._segments)

    @property
    def num_segments(self) -> int:
        return len(self._segments)

    def add(self, segment: Segment) -> int:
        self._segments.append(segment)
        return self.allocator.add_segment(segment.nbytes)

    def allocate(self, nbytes: int) -> tuple[int, memoryview]:
        """Key and memory of a block; NO_BLOCK and empty memory if there is no room."""
        key = self.allocator.allocate(nbytes)
        if key == NO_BLOCK:
            return NO_BLOCK, memoryview(b"")
        start = key & _OFFSET_MASK
        return key, self._segments[key >> _OFFSET_BITS].memory[start : start + nbytes]

    def free(self, keys: list[int]) -> None:
        for key in keys:
            self.allocator.free(key)

    def at(self, segment: int, start: int, nbytes: int) -> memoryview:
        return self._segments[segment].memory[start : start + nbytes]

    def give_back_pages(self, num_kept: int = 0) -> bool:
        """Returns the pages of all segments to the system if no more blocks are out than those kept, which lie
        in the first page. Whether it did."""
        if self.allocator.num_live > num_kept:
            return False
        for segment in self._segments:
            segment.map.madvise(mmap.MADV_REMOVE, mmap.PAGESIZE, segment.nbytes - mmap.PAGESIZE)
        return True


class _BlockView(weakref.ref["Array"]):
    """Tells when the last view of a block has gone."""

    __slots__ = ("key",)
    key: int


class ReaderSlab:
    """This process's side of the slab that the other one writes into."""

    def __init__(self, writable: bool = False) -> None:
        """`writable`: a block is the reader's to scribble on until it goes back."""
        self._writable = writable
        self._segments: list[Segment] = []
        self._views: dict[int, _BlockView] = {}
        self.released: deque[int] = deque()
        """Keys of blocks that nobody here looks at any more; the writer is told with the next message."""

    @property
    def total_bytes(self) -> int:
        return sum(segment.nbytes for segment in self._segments)

    def add(self, segment: Segment) -> None:
        if not self._writable:
            segment.source = segment.memory.toreadonly()
        self._segments.append(segment)

    def open(self, key: int, nbytes: int) -> memoryview:
        """A block's memory. Raises ValueError if it doesn't lie inside its segment."""
        if key == NO_BLOCK:
            return memoryview(b"")
        index, start = key >> _OFFSET_BITS, key & _OFFSET_MASK
        if not 0 <= index < len(self._segments) or start + nbytes > self._segments[index].nbytes:
            raise ValueError(f"block {start}+{nbytes} is not inside segment {index}")
        block: Array = np.frombuffer(self._segments[index].source, np.uint8, nbytes, start)
        view = _BlockView(block, self._on_last_view_gone)
        view.key = key
        self._views[key] = view
        return block.data

    def at(self, segment: int, start: int, nbytes: int) -> memoryview:
        return self._segments[segment].memory[start : start + nbytes]

    def take_released(self) -> list[int]:
        """The released keys, each once."""
        taken = []
        while self.released:  # views may go in any thread meanwhile
            taken.append(self.released.popleft())
        return taken

    @property
    def num_open(self) -> int:
        return len(self._views)

    def _on_last_view_gone(self, view: Any) -> None:
        del self._views[view.key]
        self.released.append(view.key)
