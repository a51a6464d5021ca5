"""Paged attention against float64, over random lengths, groups, pages and options."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from enginehouse_backends.llm.attention.tiles import PADDING_TILE, prefill_tiles, query_tokens_per_tile
from enginehouse_backends.llm.attention.triton_paged import (
    AttentionShape,
    DecodeWorkspace,
    PrefillPlan,
    decode_attention,
    prefill_attention,
)

from .paged import Sequences, scatter_sequences
from .references import attention, relative_error

# float32 sums of a few hundred terms; bfloat16 and float16 round weights and results to 8 and 11 bits. The
# FP8 cache is compared with the values that it holds, so only the float32 arithmetic differs.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def _plan(query_lens: list[int], group: int, rows: int = 32) -> PrefillPlan:
    tokens_per_tile = query_tokens_per_tile(group, rows)
    tiles = torch.tensor([*prefill_tiles(query_lens, tokens_per_tile), PADDING_TILE], dtype=torch.int32)
    return PrefillPlan(tiles, tokens_per_tile)


def _expected(sequences: Sequences, query: torch.Tensor, query_lens: list[int], shape: AttentionShape) -> torch.Tensor:
    parts, first = [], 0
    for query_len, key, value in zip(query_lens, sequences.keys, sequences.values, strict=True):
        part = query[first : first + query_len]
        first += query_len
        if len(key) == 0:
            parts.append(torch.zeros_like(part, dtype=torch.float64))
            continue
        parts.append(attention(part, key, value, shape.scale, shape.softcap, shape.window, shape.causal))
    return torch.cat(parts)


def _prefill_error(
    sequences: Sequences, query_lens: list[int], group: int, dtype: torch.dtype, shape: AttentionShape
) -> float:
    _, num_kv_heads, head_dim = sequences.keys[0].shape
    query = torch.randn(sum(query_lens), num_kv_heads * group, head_dim).to(dtype)
    out = torch.full_like(query.flatten(1), float("nan"))
    places = replace(sequences.places, query_starts=torch.tensor([0, *query_lens]).cumsum(0).int())
    prefill_attention(query.flatten(1), sequences.cache, out, places, _plan(query_lens, group), shape)
    return relative_error(out.view_as(query), _expected(sequences, query, query_lens, shape))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 1, 64), (1, 7, 32), (2, 4, 96)])
def test_prefill_of_whole_and_continued_sequences(kv_heads: int, group: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths, query_lens = [37, 1, 90, 64], [37, 1, 23, 5]
    sequences = scatter_sequences(lengths, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    error = _prefill_error(sequences, query_lens, group, dtype, AttentionShape(1 / math.sqrt(head_dim)))
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(0.2, softcap=5.0),
        AttentionShape(0.2, window=11),
        AttentionShape(0.2, softcap=3.0, window=33),
        AttentionShape(0.2, causal=False),
    ],
    ids=["softcap", "window", "softcap and window", "bidirectional"],
)
def test_prefill_options(shape: AttentionShape) -> None:
    lengths = [70, 45]
    query_lens = lengths if not shape.causal else [70, 20]
    sequences = scatter_sequences(lengths, num_kv_heads=2, head_dim=32)
    assert _prefill_error(sequences, query_lens, 2, torch.float32, shape) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("block_tokens", [16, 32, 13])
def test_block_size_is_free(block_tokens: int) -> None:
    sequences = scatter_sequences([50, 3], num_kv_heads=1, head_dim=32, block_tokens=block_tokens)
    assert _prefill_error(sequences, [9, 3], 2, torch.float32, AttentionShape(0.2)) < TOLERANCE[torch.float32]


def _decode_error(
    sequences: Sequences, group: int, dtype: torch.dtype, shape: AttentionShape, num_splits: int
) -> float:
    _, num_kv_heads, head_dim = sequences.keys[0].shape
    num_sequences, num_heads = len(sequences.keys), num_kv_heads * group
    query = torch.randn(num_sequences, num_heads, head_dim).to(dtype)
    out = torch.full((num_sequences + 1, num_heads * head_dim), float("nan"), dtype=dtype)
    workspace = DecodeWorkspace.allocate(num_sequences + 1, num_heads, num_splits, head_dim, query.device)
    workspace.out.fill_(float("nan"))
    workspace.log_sum.fill_(float("nan"))
    order = torch.tensor([*torch.randperm(num_sequences).tolist(), -1], dtype=torch.int32)
    decode_attention(query.flatten(1), sequences.cache, out, sequences.places, order, shape, workspace, num_splits)
    assert (out[-1] == 0).all(), "padding"
    return relative_error(out[:-1].view_as(query), _expected(sequences, query, [1] * num_sequences, shape))


@pytest.mark.parametrize("num_splits", [1, 2, 8])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode_of_mixed_lengths_and_padding(dtype: torch.dtype, num_splits: int) -> None:
    sequences = scatter_sequences([1, 200, 0, 64, 65, 130], num_kv_heads=2, head_dim=64, dtype=dtype)
    error = _decode_error(sequences, 4, dtype, AttentionShape(0.125), num_splits)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize(
    "shape", [AttentionShape(0.2, softcap=5.0), AttentionShape(0.2, window=70)], ids=["softcap", "window"]
)
@pytest.mark.parametrize("group", [1, 3])
def test_decode_options(shape: AttentionShape, group: int, num_splits: int) -> None:
    sequences = scatter_sequences([150, 30, 71], num_kv_heads=2, head_dim=40)
    assert _decode_error(sequences, group, torch.float32, shape, num_splits) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("num_splits", [1, 4])
def test_fp8_cache_costs_only_its_own_rounding(num_splits: int) -> None:
    sequences = scatter_sequences([100, 17], head_dim=32, dtype=torch.float8_e4m3fn, key_scale=0.05, value_scale=0.02)
    shape = AttentionShape(0.2)
    assert _decode_error(sequences, 2, torch.float32, shape, num_splits) < TOLERANCE[torch.float32]
    assert _prefill_error(sequences, [40, 17], 2, torch.float32, shape) < TOLERANCE[torch.float32]
