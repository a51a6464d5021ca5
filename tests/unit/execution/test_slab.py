"""Blocks never overlap, nothing is lost, and a block goes back when its last view has gone."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from enginehouse.execution.slab import (
    MIN_SEGMENT_BYTES,
    NO_BLOCK,
    Allocator,
    ReaderSlab,
    Segment,
    WriterSlab,
    block_bytes,
    make_segment,
)


def test_blocks_are_powers_of_two_of_at_least_a_cache_line() -> None:
    assert [block_bytes(n) for n in (1, 64, 65, 128, 1000)] == [64, 64, 128, 128, 1024]


def test_no_room_is_no_block_and_changes_nothing() -> None:
    allocator = Allocator()
    allocator.add_segment(1024)
    assert allocator.allocate(2048) == NO_BLOCK
    assert allocator.allocate(1024) != NO_BLOCK
    assert allocator.allocate(1) == NO_BLOCK


def test_freed_neighbours_become_one_block_again() -> None:
    allocator = Allocator()
    allocator.add_segment(1024)
    small = [allocator.allocate(64) for _ in range(16)]
    assert allocator.allocate(64) == NO_BLOCK
    for key in small:
        allocator.free(key)
    assert allocator.allocate(1024) != NO_BLOCK


def test_freeing_twice_is_an_error() -> None:
    allocator = Allocator()
    allocator.add_segment(1024)
    key = allocator.allocate(64)
    allocator.free(key)
    with pytest.raises(KeyError):
        allocator.free(key)


def test_any_order_of_allocating_and_freeing_keeps_every_byte() -> None:
    generator = random.Random(3)
    allocator = Allocator()
    live: list[int] = []
    for _ in range(20_000):
        if live and generator.random() < 0.5:
            allocator.free(live.pop(generator.randrange(len(live))))
        else:
            key = allocator.allocate(generator.choice([1, 64, 100, 700, 4096]))
            if key == NO_BLOCK and len(allocator.segment_bytes) < 3:
                allocator.add_segment(16384)
            elif key != NO_BLOCK:
                live.append(key)
    allocator.check_integrity()
    for key in live:
        allocator.free(key)
    assert allocator.num_live == 0
    assert allocator.allocate(16384) != NO_BLOCK


@pytest.fixture
def pair() -> tuple[WriterSlab, ReaderSlab]:
    """Both sides of one slab, here in one process."""
    fd = make_segment("test", MIN_SEGMENT_BYTES)
    writer, reader = WriterSlab(), ReaderSlab()
    writer.add(Segment(fd, MIN_SEGMENT_BYTES))
    reader.add(Segment(fd, MIN_SEGMENT_BYTES))
    os.close(fd)
    return writer, reader


def test_what_is_written_is_read(pair: tuple[WriterSlab, ReaderSlab]) -> None:
    writer, reader = pair
    key, memory = writer.allocate(5)
    memory[:] = b"bytes"
    assert bytes(reader.open(key, 5)) == b"bytes"


def test_a_block_is_released_with_its_last_view(pair: tuple[WriterSlab, ReaderSlab]) -> None:
    writer, reader = pair
    key, _ = writer.allocate(64)
    view = reader.open(key, 64)
    array = np.frombuffer(view[8:16], np.int64)
    del view
    assert reader.take_released() == []
    del array
    assert reader.take_released() == [key]
    assert reader.take_released() == []
    assert reader.num_open == 0


def test_a_readers_view_is_read_only(pair: tuple[WriterSlab, ReaderSlab]) -> None:
    writer, reader = pair
    key, _ = writer.allocate(64)
    assert reader.open(key, 64).readonly


def test_a_block_outside_of_its_segment_is_refused(pair: tuple[WriterSlab, ReaderSlab]) -> None:
    _, reader = pair
    for key, nbytes in ((MIN_SEGMENT_BYTES - 64, 128), (1 << 44, 64), (7 << 44, 1)):
        with pytest.raises(ValueError, match="not inside segment"):
            reader.open(key, nbytes)


def test_a_segment_can_neither_shrink_nor_grow() -> None:
    fd = make_segment("test", MIN_SEGMENT_BYTES)
    for size in (0, MIN_SEGMENT_BYTES // 2, MIN_SEGMENT_BYTES * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_pages_go_back_while_no_block_is_out(pair: tuple[WriterSlab, ReaderSlab]) -> None:
    writer, reader = pair
    key, memory = writer.allocate(MIN_SEGMENT_BYTES)
    memory[-1] = 7
    assert not writer.give_back_pages()
    assert reader.at(0, MIN_SEGMENT_BYTES - 1, 1)[0] == 7
    del memory
    writer.free([key])
    assert writer.give_back_pages()
    assert reader.at(0, MIN_SEGMENT_BYTES - 1, 1)[0] == 0
