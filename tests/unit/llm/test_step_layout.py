"""What a step tells the device: where it lies in the buffer, and that padding is nobody's."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from enginehouse_backends.llm.runner import IntArray, StepInput
from enginehouse_backends.llm.step_layout import (
    PADDING,
    SampledRow,
    StepLayout,
    StepSizes,
    batch_buckets,
    bucket_for,
    fill_step,
)


@given(st.integers(1, 600))
def test_buckets_waste_at_most_a_quarter_beyond_the_smallest(most: int) -> None:
    buckets = batch_buckets(most)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == most
    for size in range(1, most + 1):
        bucket = bucket_for(size, buckets)
        assert bucket is not None
        assert bucket >= size
        assert size <= 8 or bucket <= size * 1.5
    assert bucket_for(most + 1, buckets) is None


@given(*[st.integers(0, 40) for _ in range(5)])
def test_arrays_of_a_layout_do_not_overlap(tokens: int, sequences: int, wanted: int, decodes: int, tiles: int) -> None:
    layout = StepLayout.of(StepSizes(tokens, sequences, wanted, decodes, tiles))
    owner = np.zeros(layout.num_words, dtype=np.int32)
    for name in layout.places:
        layout.words(owner, name)[:] += 1
    assert (owner <= 1).all()
    assert layout.places["seeds"][0] % 2 == 0, "64-bit numbers at an even word"
    first, count = layout.places["query_starts"]
    assert layout.places["last_start"][0] == first + count, "the starts and their end are one array"


def _step(counts: list[int], wanted: list[int]) -> StepInput:
    def ints(values: object) -> IntArray:
        return np.array(values, dtype=np.int32)

    total = sum(counts)
    return StepInput(
        tokens=ints(range(100, 100 + total)),
        positions=ints(range(total)),
        query_starts=ints([0, *np.cumsum(counts).tolist()]),
        context_lengths=ints([count + 7 for count in counts]),
        slots=ints(range(len(counts)))[::-1],
        block_table=np.zeros((8, 4), dtype=np.int32),
        changed_slots=[],
        wanted_rows=ints(wanted),
        sampled=[],
        sampled_rows=ints([]),
    )


def test_a_padded_batch_names_nobody_in_its_padding() -> None:
    layout = StepLayout.of(StepSizes.of_decoding(4))
    buffer = np.full(layout.num_words, 12345, dtype=np.int32)
    sources = np.array([PADDING, 1, PADDING], dtype=np.int32)
    rows = [SampledRow(), SampledRow(0.5, 3, 0.9, 0.1, -(2**40)), SampledRow()]
    fill_step(layout, buffer, _step([1, 1, 1], [0, 1, 2]), sources, rows, [])

    def words(name: str) -> list[int]:
        found: list[int] = layout.words(buffer, name).tolist()
        return found

    assert words("tokens") == [100, 101, 102, 0]
    assert words("token_sources") == [PADDING, 1, PADDING, PADDING]
    assert words("token_sequences") == [0, 1, 2, PADDING]
    assert words("decode_sequences") == [0, 1, 2, PADDING]
    assert words("query_starts") + words("last_start") == [0, 1, 2, 3, 3]
    assert words("context_lengths")[3] == 0
    assert words("table_rows") == [2, 1, 0, 0]
    assert layout.words(buffer, "temperatures").view(np.float32).tolist() == [0.0, 0.5, 0.0, 0.0]
    assert layout.words(buffer, "seeds").view(np.int64)[1] == -(2**40)


def test_a_mixed_step_decodes_single_tokens_and_tiles_the_others() -> None:
    layout = StepLayout.of(StepSizes(7, 3, 2, 2, 2))
    buffer = np.zeros(layout.num_words, dtype=np.int32)
    sources = np.full(7, PADDING, dtype=np.int32)
    fill_step(layout, buffer, _step([1, 5, 1], [0, 6]), sources, [SampledRow()] * 2, [(1, 4), (1, 0)])
    assert layout.words(buffer, "decode_sequences").tolist() == [0, 2]
    assert layout.words(buffer, "token_sequences").tolist() == [0, 1, 1, 1, 1, 1, 2]
    assert layout.words(buffer, "tiles").tolist() == [1, 4, 1, 0]
