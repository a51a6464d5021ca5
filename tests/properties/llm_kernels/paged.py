"""A shared arena with pages of two models, and sequences scattered over it, for the attention tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from enginehouse_backends.llm.attention.triton_paged import SequencePlaces
from enginehouse_backends.llm.kernels.triton_rope import PagedKv


@dataclass
class Sequences:
    """Keys and values per sequence, and the same in the arena's pages behind block tables."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    cache: PagedKv
    places: SequencePlaces
    """Rows of the block table are in another order than the sequences. `query_starts` is the test's to set."""


def arena_views(
    num_pages: int, num_layers: int, block_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One (key, value) view a layer of pages that are larger than this model's block. Poisoned with NaN.

    Each: [pages, block_tokens, kv heads, head_dim], heads before tokens in memory.
    """
    block = block_tokens * num_kv_heads * head_dim
    page = 2 * num_layers * block + 64
    arena = torch.full((num_pages * page,), float("nan"), dtype=torch.float32).to(dtype)
    strides = (page, head_dim, block_tokens * head_dim, 1)
    size = (num_pages, block_tokens, num_kv_heads, head_dim)
    views = [arena.as_strided(size, strides, part * block) for part in range(2 * num_layers)]
    return list(zip(views[0::2], views[1::2], strict=True))


def scatter_sequences(
    lengths: list[int],
    *,
    block_tokens: int = 16,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Sequences:
    """Random keys and values for sequences of these lengths, in random pages of an arena full of NaN.

    The keys and values that come back are what the cache can hold: rounded to `dtype`.
    """
    blocks_each = [-(-length // block_tokens) for length in lengths]
    num_pages = sum(blocks_each) * 2 + 3
    key_view, value_view = arena_views(num_pages, 2, block_tokens, num_kv_heads, head_dim, dtype)[1]
    cache = PagedKv(key_view, value_view, key_scale, value_scale)
    free = torch.randperm(num_pages).tolist()
    tables = torch.full((len(lengths), max([*blocks_each, 1]) + 1), 2**30, dtype=torch.int32)
    keys, values = [], []
    for row, (length, num_blocks) in enumerate(zip(lengths, blocks_each, strict=True)):
        pages = [free.pop() for _ in range(num_blocks)]
        tables[row, :num_blocks] = torch.tensor(pages, dtype=torch.int32)
        key = (torch.randn(length, num_kv_heads, head_dim) / key_scale).to(dtype)
        value = (torch.randn(length, num_kv_heads, head_dim) / value_scale).to(dtype)
        for token in range(length):
            page, offset = pages[token // block_tokens], token % block_tokens
            key_view[page, offset] = key[token]
            value_view[page, offset] = value[token]
        keys.append(key.float() * key_scale)
        values.append(value.float() * value_scale)
    rows = torch.randperm(len(lengths))
    table = torch.empty_like(tables)
    table[rows] = tables
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    places = SequencePlaces(starts, torch.tensor(lengths, dtype=torch.int32), rows.int(), table)
    return Sequences(keys, values, cache, places)
