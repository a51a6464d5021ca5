"""Triton kernels of attention over a paged cache: prefill of many sequences, split decoding, reduction.

The softmax is online and float32. A program packs the query heads that share a KV head into the rows of one
matrix product, so that every key is read once for its whole group. Which program does what is planned
outside (`attention/tiles.py`): nothing here depends on lengths that the host would have to read back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from enginehouse_backends.llm.kernels.triton_elementwise import tanh


@triton.jit
def _load_cached(cache, blocks, offsets, valid, columns, inside, block_stride, token_stride, HAS_PADDING: tl.constexpr):
    at = blocks.to(tl.int64)[:, None] * block_stride + offsets[:, None] * token_stride + columns[None, :]
    if HAS_PADDING:
        return tl.load(cache + at, mask=valid[:, None] & inside[None, :], other=0.0)
    return tl.load(cache + at, mask=valid[:, None], other=0.0)


@triton.jit
def _attend(
    query,
    row_position,
    row_inside,
    block_table,
    key_cache,
    value_cache,
    start,
    stop,
    seq_len,
    block_stride,
    token_stride,
    scale,
    softcap,
    value_scale,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The online softmax of `query` rows over cached tokens [start, stop).

    query: [rows, head] → running maximum (base 2) and sum [rows], and the unnormalised result [rows, head].
    """
    columns = tl.arange(0, BLOCK_HEAD)
    head_inside = columns < HEAD_DIM
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    result = tl.zeros([BLOCK_ROWS, BLOCK_HEAD], tl.float32)
    for first in range(start, stop, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        valid = tokens < stop
        blocks = tl.load(block_table + tokens // BLOCK_TOKENS, mask=valid, other=0)
        offsets = tokens % BLOCK_TOKENS
        key = _load_cached(
            key_cache, blocks, offsets, valid, columns, head_inside, block_stride, token_stride,
            BLOCK_HEAD != HEAD_DIM,
        )  # fmt: skip
        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        allowed = valid[None, :] & row_inside[:, None]
        if CAUSAL:
            allowed &= tokens[None, :] <= row_position[:, None]
        if WINDOW:
            allowed &= tokens[None, :] > row_position[:, None] - window
        # Base 2: the log2(e) rides along with the scale, exp2 is what the hardware has.
        scores = tl.where(allowed, scores * 1.4426950408889634, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        # A row that has seen nothing yet keeps -inf; subtracting it from itself would be NaN.
        safe_maximum = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - safe_maximum[:, None])
        correction = tl.exp2(maximum - safe_maximum)
        total = total * correction + tl.sum(weights, axis=1)
        value = _load_cached(
            value_cache, blocks, offsets, valid, columns, head_inside, block_stride, token_stride,
            BLOCK_HEAD != HEAD_DIM,
        )  # fmt: skip
        result = result * correction[:, None]
        result = tl.dot(weights.to(query.dtype), value.to(query.dtype), result, input_precision="ieee")
        maximum = new_maximum
    return maximum, total, result * value_scale


@triton.jit
def prefill_kernel(
    query,
    key_cache,
    value_cache,
    out,
    tiles,
    query_starts,
    seq_lens,
    table_rows,
    block_table,
    query_stride,
    out_stride,
    block_table_stride,
    block_stride,
    token_stride,
    head_stride,
    scale,
    softcap,
    value_scale,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program (tile, kv head): BLOCK_Q query tokens of one sequence, all query heads of the group.

    tiles: [programs, 2] int32: sequence (negative for padding) and first query token within it.
    """
    sequence = tl.load(tiles + 2 * tl.program_id(0))
    if sequence < 0:
        return
    first_query = tl.load(tiles + 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    query_start = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - query_start
    seq_len = tl.load(seq_lens + sequence)

    rows = tl.arange(0, BLOCK_Q * BLOCK_GROUP)
    row_query = first_query + rows // BLOCK_GROUP
    row_head = rows % BLOCK_GROUP
    row_inside = (row_query < num_queries) & (row_head < GROUP)
    row_position = seq_len - num_queries + row_query
    columns = tl.arange(0, BLOCK_HEAD)
    head = (kv_head * GROUP + row_head) * HEAD_DIM
    mask = row_inside[:, None] & (columns < HEAD_DIM)[None, :]
    row_at = (query_start + row_query).to(tl.int64)
    at = row_at[:, None] * query_stride + head[:, None] + columns[None, :]
    query_rows = tl.load(query + at, mask=mask, other=0.0)

    start = 0
    stop = seq_len
    if CAUSAL:
        stop = tl.minimum(seq_len, seq_len - num_queries + first_query + BLOCK_Q)
    if WINDOW:
        start = tl.maximum(0, seq_len - num_queries + first_query - window + 1) // BLOCK_N * BLOCK_N
    _, total, result = _attend(
        query_rows,
        row_position,
        row_inside,
        block_table + tl.load(table_rows + sequence).to(tl.int64) * block_table_stride,
        key_cache + kv_head * head_stride,
        value_cache + kv_head * head_stride,
        start,
        stop,
        seq_len,
        block_stride,
        token_stride,
        scale,
        softcap,
        value_scale,
        window,
        HEAD_DIM,
        BLOCK_HEAD,
        BLOCK_TOKENS,
        BLOCK_N,
        BLOCK_Q * BLOCK_GROUP,
        CAUSAL,
        SOFTCAP,
        WINDOW,
    )
    result = result / tl.where(total > 0.0, total, 1.0)[:, None]
    at = row_at[:, None] * out_stride + head[:, None] + columns[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def decode_kernel(
    query,
    key_cache,
    value_cache,
    out,
    partial_out,
    partial_log_sum,
    sequences,
    query_starts,
    seq_lens,
    table_rows,
    block_table,
    query_stride,
    out_stride,
    block_table_stride,
    block_stride,
    token_stride,
    head_stride,
    scale,
    softcap,
    value_scale,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program (place in `sequences`, kv head, split): one query token against its share of the cached tokens.

    Negative sequences are padding: the row at their own place becomes zeros. Shares are whole tiles of the length
    that is in `seq_lens` when the kernel runs, so one captured graph serves every length. partial_out: [programs,
    query heads, splits, head] float32; each split is a finished softmax, its log-sum (base 2) in partial_log_sum.
    """
    index = tl.program_id(0).to(tl.int64)
    sequence = tl.load(sequences + index)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if sequence < 0:
        if NUM_SPLITS == 1:
            width = GROUP * HEAD_DIM
            for first in range(0, width, BLOCK_HEAD):
                inner = first + tl.arange(0, BLOCK_HEAD)
                at = out + index * out_stride + kv_head * width + inner
                tl.store(at, tl.zeros([BLOCK_HEAD], out.dtype.element_ty), mask=inner < width)
        return
    token = tl.load(query_starts + sequence).to(tl.int64)
    seq_len = tl.load(seq_lens + sequence)
    first = 0
    if WINDOW:
        first = tl.maximum(0, seq_len - window)
    share = tl.cdiv(tl.cdiv(seq_len - first, NUM_SPLITS), BLOCK_N) * BLOCK_N
    start = first + split * share
    stop = tl.minimum(start + share, seq_len)

    rows = tl.arange(0, BLOCK_GROUP)
    row_inside = rows < GROUP
    columns = tl.arange(0, BLOCK_HEAD)
    head = kv_head * GROUP + rows
    mask = row_inside[:, None] & (columns < HEAD_DIM)[None, :]
    at = token * query_stride + head[:, None] * HEAD_DIM + columns[None, :]
    query_rows = tl.load(query + at, mask=mask, other=0.0)
    maximum, total, result = _attend(
        query_rows,
        tl.full([BLOCK_GROUP], 0, tl.int32) + seq_len - 1,
        row_inside,
        block_table + tl.load(table_rows + sequence).to(tl.int64) * block_table_stride,
        key_cache + kv_head * head_stride,
        value_cache + kv_head * head_stride,
        start,
        stop,
        seq_len,
        block_stride,
        token_stride,
        scale,
        softcap,
        value_scale,
        window,
        HEAD_DIM,
        BLOCK_HEAD,
        BLOCK_TOKENS,
        BLOCK_N,
        BLOCK_GROUP,
        False,
        SOFTCAP,
        WINDOW,
    )
    seen = total > 0.0
    result = result / tl.where(seen, total, 1.0)[:, None]
    if NUM_SPLITS == 1:
        at = token * out_stride + head[:, None] * HEAD_DIM + columns[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)
    else:
        num_heads = tl.num_programs(1) * GROUP
        part = (index * num_heads + head) * NUM_SPLITS + split
        tl.store(partial_out + part[:, None] * HEAD_DIM + columns[None, :], result, mask=mask)
        log_sum = tl.where(seen, maximum + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        tl.store(partial_log_sum + part, log_sum, mask=row_inside)


@triton.jit
def reduce_splits_kernel(
    partial_out,
    partial_log_sum,
    out,
    sequences,
    query_starts,
    out_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Program (place in `sequences`, query head): the splits' results by weight; empty ones weigh nothing."""
    index = tl.program_id(0).to(tl.int64)
    sequence = tl.load(sequences + index)
    head = tl.program_id(1)
    row = index * tl.num_programs(1) + head
    splits = tl.arange(0, BLOCK_SPLITS)
    columns = tl.arange(0, BLOCK_HEAD)
    if sequence < 0:
        at = out + index * out_stride + head * HEAD_DIM + columns
        tl.store(at, tl.zeros([BLOCK_HEAD], out.dtype.element_ty), mask=columns < HEAD_DIM)
        return
    log_sums = tl.load(partial_log_sum + row * NUM_SPLITS + splits, mask=splits < NUM_SPLITS, other=float("-inf"))
    maximum = tl.max(log_sums, axis=0)
    weights = tl.exp2(log_sums - tl.where(maximum == float("-inf"), 0.0, maximum))
    part = (row * NUM_SPLITS + splits)[:, None] * HEAD_DIM + columns[None, :]
    mask = (weights > 0.0)[:, None] & (columns < HEAD_DIM)[None, :]
    result = tl.sum(tl.load(partial_out + part, mask=mask, other=0.0) * weights[:, None], axis=0)
    total = tl.sum(weights, axis=0)
    result = result / tl.where(total > 0.0, total, 1.0)
    at = out + tl.load(query_starts + sequence).to(tl.int64) * out_stride + head * HEAD_DIM + columns
    tl.store(at, result.to(out.dtype.element_ty), mask=columns < HEAD_DIM)
