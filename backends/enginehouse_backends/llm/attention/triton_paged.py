"""Launches the Triton attention kernels: prefill by tiles, decoding by splits with a reduction.

Nothing here reads back from the device or allocates in a decode step: workspace and metadata are handed in,
so that decoding can be captured into a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from enginehouse_backends.llm.kernels.triton_attention import (
    decode_kernel,
    prefill_kernel,
    reduce_splits_kernel,
)
from enginehouse_backends.llm.kernels.triton_rope import PagedKv


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a layer's attention computes, besides its tensors. 0 turns soft-capping or the window off."""

    scale: float
    softcap: float = 0.0
    window: int = 0
    """A query sees itself and the `window - 1` tokens before it."""
    causal: bool = True


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Device tensors of one step's prefill, made from `tiles.prefill_tiles`.

    tiles: [programs, 2] int32.
    """

    tiles: torch.Tensor
    tokens_per_tile: int


@dataclass(frozen=True, slots=True)
class SequencePlaces:
    """Where a step's sequences are, on the device: all int32.

    query_starts: [sequences + 1] · seq_lens: [sequences] cached tokens including this step's · table_rows:
    [sequences] each one's row of the block table · block_table: [rows, blocks].
    """

    query_starts: torch.Tensor
    seq_lens: torch.Tensor
    table_rows: torch.Tensor
    block_table: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Where splits leave their results. Made once for the largest batch and shared by all layers.

    out: float32, at least sequences * query heads * splits * head_dim · log_sum: without head_dim.
    """

    out: torch.Tensor
    log_sum: torch.Tensor

    @classmethod
    def allocate(
        cls, num_sequences: int, num_heads: int, num_splits: int, head_dim: int, device: torch.device
    ) -> DecodeWorkspace:
        rows = num_sequences * num_heads * num_splits
        return cls(
            torch.empty(rows * head_dim, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )


def prefill_attention(
    query: torch.Tensor,
    cache: PagedKv,
    out: torch.Tensor,
    places: SequencePlaces,
    plan: PrefillPlan,
    shape: AttentionShape,
) -> None:
    """query, out: [tokens, query heads * head_dim], tokens of all sequences after each other."""
    _, block_tokens, num_kv_heads, head_dim = cache.key.shape
    group = query.shape[1] // head_dim // num_kv_heads
    block_head = triton.next_power_of_2(head_dim)
    if plan.tiles.shape[0] == 0:
        return
    prefill_kernel[(plan.tiles.shape[0], num_kv_heads)](
        query,
        cache.key,
        cache.value,
        out,
        plan.tiles,
        places.query_starts,
        places.seq_lens,
        places.table_rows,
        places.block_table,
        query.stride(0),
        out.stride(0),
        places.block_table.stride(0),
        *cache.key.stride()[:3],
        shape.scale * cache.key_scale,
        shape.softcap,
        cache.value_scale,
        shape.window,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_HEAD=block_head,
        BLOCK_TOKENS=block_tokens,
        BLOCK_Q=plan.tokens_per_tile,
        BLOCK_GROUP=triton.next_power_of_2(group),
        BLOCK_N=prefill_block_n(block_head, query.element_size()),
        CAUSAL=shape.causal,
        SOFTCAP=shape.softcap > 0.0,
        WINDOW=shape.window > 0,
        num_warps=8 if plan.tokens_per_tile * triton.next_power_of_2(group) >= 128 else 4,
        num_stages=2 if block_head > 128 else 3,
    )


def prefill_block_n(block_head: int, element_size: int) -> int:
    """Cached tokens a tile: what fits into shared memory beside the queries, twice or thrice buffered."""
    return 64 if block_head * element_size <= 256 else 32


def decode_attention(
    query: torch.Tensor,
    cache: PagedKv,
    out: torch.Tensor,
    places: SequencePlaces,
    sequences: torch.Tensor,
    shape: AttentionShape,
    workspace: DecodeWorkspace,
    num_splits: int,
) -> None:
    """query, out: [tokens, query heads * head_dim]; keys of the step are cached already.

    sequences: [programs] int32, those with one query token each; negative for padding, whose own places among the
    rows of `out` become zeros: only where all sequences of a step decode.
    """
    _, block_tokens, num_kv_heads, head_dim = cache.key.shape
    num_sequences, num_heads = sequences.shape[0], query.shape[1] // head_dim
    group = num_heads // num_kv_heads
    block_head = triton.next_power_of_2(head_dim)
    if num_sequences == 0:
        return
    decode_kernel[(num_sequences, num_kv_heads, num_splits)](
        query,
        cache.key,
        cache.value,
        out,
        workspace.out,
        workspace.log_sum,
        sequences,
        places.query_starts,
        places.seq_lens,
        places.table_rows,
        places.block_table,
        query.stride(0),
        out.stride(0),
        places.block_table.stride(0),
        *cache.key.stride()[:3],
        shape.scale * cache.key_scale,
        shape.softcap,
        cache.value_scale,
        shape.window,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_HEAD=block_head,
        BLOCK_TOKENS=block_tokens,
        BLOCK_GROUP=max(triton.next_power_of_2(group), 16),
        BLOCK_N=decode_block_n(block_head),
        NUM_SPLITS=num_splits,
        SOFTCAP=shape.softcap > 0.0,
        WINDOW=shape.window > 0,
        num_warps=4,
        num_stages=3,
    )
    if num_splits == 1:
        return
    reduce_splits_kernel[(num_sequences, num_heads)](
        workspace.out,
        workspace.log_sum,
        out,
        sequences,
        places.query_starts,
        out.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_HEAD=block_head,
        NUM_SPLITS=num_splits,
        BLOCK_SPLITS=triton.next_power_of_2(num_splits),
        num_warps=2,
    )


def decode_block_n(block_head: int) -> int:
    """Cached tokens a tile of decoding: 16 KiB of keys in bf16."""
    return 64 if block_head <= 128 else 32
