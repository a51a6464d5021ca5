"""Tiles and splits of attention: every query token once, and no more splits than are of use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from enginehouse_backends.llm.attention.tiles import (
    MAX_SPLITS,
    num_decode_splits,
    prefill_tiles,
    query_tokens_per_tile,
    rows_per_tile,
)


@given(st.lists(st.integers(0, 300), max_size=8), st.sampled_from([1, 4, 32]))
def test_tiles_cover_every_query_token_once(query_lens: list[int], tokens_per_tile: int) -> None:
    covered = [
        (sequence, token)
        for sequence, first in prefill_tiles(query_lens, tokens_per_tile)
        for token in range(first, min(first + tokens_per_tile, query_lens[sequence]))
    ]
    expected = {(sequence, token) for sequence, length in enumerate(query_lens) for token in range(length)}
    assert len(covered) == len(expected)
    assert set(covered) == expected


@given(st.integers(1, 32), st.sampled_from([64, 96, 128, 256]))
def test_a_tile_fills_the_matrix_unit_and_no_more(group: int, head_dim: int) -> None:
    rows = query_tokens_per_tile(group, rows_per_tile(head_dim)) * group
    assert rows <= rows_per_tile(head_dim)
    assert rows * 2 > 16, "less than half of the matrix unit's rows are used"


@given(st.integers(0, 600), st.integers(1, 64), st.integers(1, 4000))
def test_splits_fill_the_device_without_being_empty(num_sequences: int, kv_heads: int, max_tiles: int) -> None:
    splits = num_decode_splits(num_sequences, kv_heads, 132, max_tiles)
    assert 1 <= splits <= min(max_tiles, MAX_SPLITS)
    assert splits == 1 or num_sequences * kv_heads * splits <= 2 * 132
    more_would_fit = num_sequences * kv_heads * splits * 2 <= 2 * 132
    assert not (more_would_fit and splits * 2 <= min(max_tiles, MAX_SPLITS))
