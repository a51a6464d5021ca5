"""Triton kernels of products with quantized weights: 4- and 8-bit codes with group scales, and FP8 by FP8.

Codes stay codes until they are in registers. Where a group is at least half a chunk wide, whole numbers are
multiplied and the scale is applied to the float32 sum, so dequantizing rounds nothing. `quantization/codes.py`
says how codes are packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

CHUNK = 128
"""Inputs that one packed chunk of 4-bit codes covers: low halves of its 64 bytes are the first 64 inputs."""


@triton.jit
def _coded_kernel(
    x,
    codes,
    scales,
    zeros,
    table,
    out,
    num_rows,
    num_columns,
    chunks_per_split,
    num_chunks,
    depth,
    x_stride,
    chunk_stride,
    column_stride,
    scale_stride,
    out_split_stride,
    out_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    DEFAULT_ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (column block, row block, split): sums over its chunks of 128 inputs.

    codes: byte (column, chunk, i) at column * column_stride + chunk * chunk_stride + i. scales, zeros:
    [columns, groups]. A split's result goes to out[split]; splits are summed by the caller.
    """
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < num_rows
    column_inside = columns < num_columns
    half = tl.arange(0, 64)
    split = tl.program_id(2)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    codes_at = codes + columns.to(tl.int64)[:, None] * column_stride + half[None, :]
    x_at = x + rows.to(tl.int64)[:, None] * x_stride + half[None, :]
    scale_at = columns.to(tl.int64) * scale_stride
    first = split * chunks_per_split
    codes_at += first.to(tl.int64) * chunk_stride
    for chunk in range(first, tl.minimum(first + chunks_per_split, num_chunks)):
        if BITS == 4:
            packed = tl.load(codes_at, mask=column_inside[:, None], other=0)
        for part in tl.static_range(2):
            if BITS == 4:
                code = (packed >> (4 * part)) & 15
            else:
                code = tl.load(codes_at + 64 * part, mask=column_inside[:, None], other=0)
            inputs = chunk * 128 + 64 * part + half
            left = tl.load(
                x_at + chunk * 128 + 64 * part, mask=row_inside[:, None] & (inputs < depth)[None, :], other=0.0
            )
            if CODEBOOK:
                value = tl.load(table + code.to(tl.int32))
            else:
                value = code.to(tl.float32)
            if GROUP >= 64:
                group_at = scale_at + (chunk * 128 + 64 * part) // GROUP
                if HAS_ZEROS:
                    value -= tl.load(zeros + group_at, mask=column_inside, other=0).to(tl.float32)[:, None]
                elif not CODEBOOK:
                    value -= DEFAULT_ZERO
                product = tl.dot(left, tl.trans(value.to(left.dtype)), input_precision="ieee")
                scale = tl.load(scales + group_at, mask=column_inside, other=0.0).to(tl.float32)
                total += product * scale[None, :]
            else:
                group_at = scale_at[:, None] + (inputs // GROUP)[None, :]
                if HAS_ZEROS:
                    value -= tl.load(zeros + group_at, mask=column_inside[:, None], other=0).to(tl.float32)
                elif not CODEBOOK:
                    value -= DEFAULT_ZERO
                scale = tl.load(scales + group_at, mask=column_inside[:, None], other=0.0).to(tl.float32)
                value = (value * scale).to(left.dtype)
                total = tl.dot(left, tl.trans(value), total, input_precision="ieee")
        codes_at += chunk_stride
    at = out + split.to(tl.int64) * out_split_stride + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A weight [columns, depth] as codes. value = (code - zero) * scale, or table[code] * scale.

    codes: [chunks, columns, 64 or 128] uint8 for 4 or 8 bits, contiguous · scales: [columns, groups] ·
    zeros: as scales, uint8; None if `default_zero` is everyone's · table: [2^bits] float32 or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group_size: int
    depth: int
    default_zero: int = 0
    table: torch.Tensor | None = None

    @property
    def num_columns(self) -> int:
        return self.codes.shape[1]


def coded_linear(x: torch.Tensor, weight: CodedWeight, num_multiprocessors: int) -> torch.Tensor:
    """x: [rows, depth] → [rows, columns] in x's type."""
    num_rows, num_columns = x.shape[0], weight.num_columns
    num_chunks = weight.codes.shape[0]
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    block_n = 64
    programs = triton.cdiv(num_columns, block_n) * triton.cdiv(num_rows, block_m)
    num_splits = choose_splits(programs, num_chunks, num_multiprocessors) if num_rows <= 32 else 1
    chunks_per_split = triton.cdiv(num_chunks, num_splits)
    partial = x.new_empty((num_splits, num_rows, num_columns), dtype=torch.float32 if num_splits > 1 else x.dtype)
    _coded_kernel[(triton.cdiv(num_columns, block_n), triton.cdiv(num_rows, block_m), num_splits)](
        x,
        weight.codes,
        weight.scales,
        weight.codes if weight.zeros is None else weight.zeros,
        weight.scales if weight.table is None else weight.table,
        partial,
        num_rows,
        num_columns,
        chunks_per_split,
        num_chunks,
        weight.depth,
        x.stride(0),
        weight.codes.stride(0),
        weight.codes.stride(1),
        weight.scales.stride(0),
        partial.stride(0),
        partial.stride(1),
        BITS=weight.bits,
        GROUP=weight.group_size,
        HAS_ZEROS=weight.zeros is not None,
        DEFAULT_ZERO=weight.default_zero,
        CODEBOOK=weight.table is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
        num_stages=4 if weight.bits == 4 else 3,
    )
    return partial[0] if num_splits == 1 else partial.sum(0).to(x.dtype)


def choose_splits(programs: int, num_chunks: int, num_multiprocessors: int) -> int:
    """A power of two: two programs a multiprocessor, but at least four chunks of work for each."""
    splits = 1
    while splits * 2 * programs <= 2 * num_multiprocessors and splits * 2 <= max(num_chunks // 4, 1):
        splits *= 2
    return splits


@triton.jit
def _quantize_rows_kernel(x, codes, scales, depth, x_stride, codes_stride, scales_stride, GROUP: tl.constexpr):
    """Program (row, group): FP8 codes with one scale, chosen so that the largest value is FP8's largest."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = group * GROUP + tl.arange(0, GROUP)
    inside = columns < depth
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=0)
    scale = tl.maximum(largest, 1e-10) / 448.0
    code = tl.minimum(tl.maximum(value / scale, -448.0), 448.0).to(codes.dtype.element_ty)
    tl.store(codes + row * codes_stride + columns, code, mask=inside)
    tl.store(scales + row * scales_stride + group, scale)


def quantize_rows(x: torch.Tensor, group_size: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [rows, depth] → FP8 codes [rows, depth], float32 scales [rows, groups]. 0 makes one group a row."""
    num_rows, depth = x.shape
    group = group_size or triton.next_power_of_2(depth)
    num_groups = triton.cdiv(depth, group)
    codes = torch.empty((num_rows, depth), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_rows, num_groups), dtype=torch.float32, device=x.device)
    _quantize_rows_kernel[(num_rows, num_groups)](
        x,
        codes,
        scales,
        depth,
        x.stride(0),
        codes.stride(0),
        scales.stride(0),
        GROUP=group,
        num_warps=min(max(group // 512, 1), 8),
    )
    return codes, scales


@triton.jit
def _fp8_kernel(
    x,
    weight,
    x_scales,
    weight_scales,
    out,
    num_rows,
    num_columns,
    depth,
    x_stride,
    weight_stride,
    x_scale_row_stride,
    x_scale_group_stride,
    weight_scale_row_stride,
    weight_scale_group_stride,
    out_stride,
    WEIGHT_BLOCK_ROWS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (row block, column block). GROUPED scales each block of BLOCK_K inputs by itself."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < num_rows
    column_inside = columns < num_columns
    depths = tl.arange(0, BLOCK_K)
    x_at = x + rows.to(tl.int64)[:, None] * x_stride + depths[None, :]
    weight_at = weight + columns.to(tl.int64)[None, :] * weight_stride + depths[:, None]
    x_scale_at = x_scales + rows * x_scale_row_stride
    weight_scale_at = weight_scales + (columns // WEIGHT_BLOCK_ROWS) * weight_scale_row_stride
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        inside = depths < depth - first
        left = tl.load(x_at + first, mask=row_inside[:, None] & inside[None, :], other=0.0)
        right = tl.load(weight_at + first, mask=column_inside[None, :] & inside[:, None], other=0.0)
        if GROUPED:
            group = first // BLOCK_K
            row_scale = tl.load(x_scale_at + group * x_scale_group_stride, mask=row_inside, other=0.0)
            column_scale = tl.load(weight_scale_at + group * weight_scale_group_stride, mask=column_inside, other=0.0)
            total += tl.dot(left, right) * row_scale[:, None] * column_scale[None, :]
        else:
            total = tl.dot(left, right, total)
    if not GROUPED:
        row_scale = tl.load(x_scale_at, mask=row_inside, other=0.0)
        column_scale = tl.load(weight_scale_at, mask=column_inside, other=0.0)
        total = total * row_scale[:, None] * column_scale[None, :]
    at = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight [columns, depth] in float8_e4m3fn. scales: [column blocks, depth blocks] float32.

    One scale for all is [1, 1] with block_rows ≥ columns; one a column is [columns, 1] with block_rows 1;
    DeepSeek's blocks are 128 by 128, and then rows of x are scaled in groups of 128 too.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    block_rows: int
    block_depth: int = 0


def fp8_linear(x_codes: torch.Tensor, x_scales: torch.Tensor, weight: Fp8Weight, dtype: torch.dtype) -> torch.Tensor:
    """x as `quantize_rows` gives it (x_scales: [rows or 1, groups]) → [rows, columns] in `dtype`."""
    num_rows, depth = x_codes.shape
    num_columns = weight.weight.shape[0]
    out = torch.empty((num_rows, num_columns), dtype=dtype, device=x_codes.device)
    block_m = 16 if num_rows <= 16 else 64 if num_rows <= 64 else 128
    block_n = 64 if block_m == 16 else 128
    _fp8_kernel[(triton.cdiv(num_rows, block_m), triton.cdiv(num_columns, block_n))](
        x_codes,
        weight.weight,
        x_scales,
        weight.scales,
        out,
        num_rows,
        num_columns,
        depth,
        x_codes.stride(0),
        weight.weight.stride(0),
        0 if x_scales.shape[0] == 1 else x_scales.stride(0),
        x_scales.stride(1),
        weight.scales.stride(0),
        weight.scales.stride(1),
        out.stride(0),
        WEIGHT_BLOCK_ROWS=weight.block_rows,
        GROUPED=weight.block_depth > 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=weight.block_depth or 128,
        num_warps=4 if block_m < 128 else 8,
        num_stages=3,
    )
    return out
