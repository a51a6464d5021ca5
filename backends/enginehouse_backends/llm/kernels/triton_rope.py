"""Triton kernel that splits a fused qkv row, norms and rotates queries and keys, and writes the paged cache.

One pass over qkv: rotated queries go to a dense tensor, keys and values to the slots of their tokens. A
token of a negative sequence is padding: its cache write is skipped, so padded graph replays change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class PagedKv:
    """One layer's cache: views of the arena. Pages of other models lie between the blocks of this one.

    key, value: [num_blocks, block_tokens, num_kv_heads, head_dim], any strides, last axis contiguous, both
    with the same strides. FP8 caches hold value / scale.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0

    def __post_init__(self) -> None:
        assert self.key.stride() == self.value.stride(), "bug: key and value views differ in strides"
        assert self.key.stride(3) == 1, "bug: a head's values must be contiguous"


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm of each query and key head (Qwen3, Gemma 3) before the rotation."""

    query_weight: torch.Tensor
    key_weight: torch.Tensor
    epsilon: float
    weight_offset: float = 0.0


@triton.jit
def to_cache(value, TYPE: tl.constexpr):
    """Rounded to the cache's type; FP8 saturates, as an infinity there would be a NaN."""
    if tl.float8e4nv == TYPE:
        value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    return value.to(TYPE)


@triton.jit
def _rope_write_kernel(
    qkv,
    cos_sin,
    positions,
    token_sequences,
    table_rows,
    block_table,
    query_norm,
    key_norm,
    query_out,
    key_cache,
    value_cache,
    qkv_stride,
    query_out_stride,
    cos_sin_stride,
    block_table_stride,
    block_stride,
    token_stride,
    head_stride,
    epsilon,
    norm_offset,
    key_inverse_scale,
    value_inverse_scale,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    is_query = head < NUM_QUERY_HEADS
    is_key = (head >= NUM_QUERY_HEADS) & (head < NUM_QUERY_HEADS + NUM_KV_HEADS)
    columns = tl.arange(0, BLOCK_HEAD)
    inside = columns < HEAD_DIM
    head_at = qkv + token * qkv_stride + head * HEAD_DIM
    value = tl.load(head_at + columns, mask=inside, other=0.0).to(tl.float32)

    position = tl.load(positions + token)
    if (ROTARY_DIM > 0) & (is_query | is_key):
        # Each column is rotated with its partner; both are read, so that one program needs no exchange.
        half = ROTARY_DIM // 2
        if INTERLEAVED:
            partner = columns ^ 1
            frequency = columns // 2
            first = (columns % 2) == 0
        else:
            first = columns < half
            partner = tl.where(first, columns + half, columns - half)
            frequency = tl.where(first, columns, columns - half)
        rotated = columns < ROTARY_DIM
        partner = tl.where(rotated, partner, columns)
        other = tl.load(head_at + partner, mask=inside, other=0.0).to(tl.float32)
        if HEAD_NORM:
            scale = tl.rsqrt(tl.sum(value * value, axis=0) / HEAD_DIM + epsilon)
            norm = key_norm
            if is_query:
                norm = query_norm
            # Rounded between norm and rotation where the model's own layers would round.
            gain = tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32) + norm_offset
            partner_gain = tl.load(norm + partner, mask=inside, other=0.0).to(tl.float32) + norm_offset
            value = (value * scale * gain).to(qkv.dtype.element_ty).to(tl.float32)
            other = (other * scale * partner_gain).to(qkv.dtype.element_ty).to(tl.float32)
        angle_at = cos_sin + position.to(tl.int64) * cos_sin_stride + frequency
        cosine = tl.load(angle_at, mask=rotated, other=1.0)
        sine = tl.load(angle_at + half, mask=rotated, other=0.0)
        value = value * cosine + tl.where(first, -other, other) * sine

    if is_query:
        at = query_out + token * query_out_stride + head * HEAD_DIM + columns
        tl.store(at, value.to(query_out.dtype.element_ty), mask=inside)
    else:
        sequence = tl.load(token_sequences + token)
        if sequence >= 0:
            kv_head = (head - NUM_QUERY_HEADS) % NUM_KV_HEADS
            table_row = tl.load(table_rows + sequence).to(tl.int64)
            block = tl.load(block_table + table_row * block_table_stride + position // BLOCK_TOKENS)
            at = block.to(tl.int64) * block_stride + (position % BLOCK_TOKENS) * token_stride
            at += kv_head * head_stride + columns
            if is_key:
                tl.store(
                    key_cache + at,
                    to_cache(value * key_inverse_scale, key_cache.dtype.element_ty),
                    mask=inside,
                )
            else:
                tl.store(
                    value_cache + at,
                    to_cache(value * value_inverse_scale, value_cache.dtype.element_ty),
                    mask=inside,
                )


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Where a step's tokens belong, on the device: all int32.

    positions, token_sequences: [tokens]; a negative sequence is padding: nothing is written for it ·
    table_rows: [sequences] each sequence's row of the block table · block_table: [rows, blocks].
    """

    positions: torch.Tensor
    token_sequences: torch.Tensor
    table_rows: torch.Tensor
    block_table: torch.Tensor


def rope_and_write(
    qkv: torch.Tensor,
    query_out: torch.Tensor,
    cache: PagedKv,
    places: TokenPlaces,
    cos_sin: torch.Tensor | None,
    *,
    num_query_heads: int,
    norm: HeadNorm | None = None,
    interleaved: bool = False,
) -> None:
    """qkv: [tokens, (query + 2 * kv heads) * head_dim] → query_out: [tokens, query heads * head_dim], cache.

    cos_sin: [positions, rotary_dim] float32, cosines in the first half, sines in the second; None turns nothing.
    """
    num_tokens = qkv.shape[0]
    if num_tokens == 0:
        return
    _, block_tokens, num_kv_heads, head_dim = cache.key.shape
    _rope_write_kernel[(num_tokens, num_query_heads + 2 * num_kv_heads)](
        qkv,
        qkv if cos_sin is None else cos_sin,
        places.positions,
        places.token_sequences,
        places.table_rows,
        places.block_table,
        qkv if norm is None else norm.query_weight,
        qkv if norm is None else norm.key_weight,
        query_out,
        cache.key,
        cache.value,
        qkv.stride(0),
        query_out.stride(0),
        0 if cos_sin is None else cos_sin.stride(0),
        places.block_table.stride(0),
        *cache.key.stride()[:3],
        1.0 if norm is None else norm.epsilon,
        0.0 if norm is None else norm.weight_offset,
        1.0 / cache.key_scale,
        1.0 / cache.value_scale,
        NUM_QUERY_HEADS=num_query_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=0 if cos_sin is None else cos_sin.shape[1],
        BLOCK_TOKENS=block_tokens,
        HEAD_NORM=norm is not None,
        INTERLEAVED=interleaved,
        BLOCK_HEAD=triton.next_power_of_2(head_dim),
        num_warps=1,
    )
