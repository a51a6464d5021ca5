"""Triton kernels of a mixture of experts: one grouped product over all experts, gate and routing fused in.

Rows are sorted by expert and each expert's rows padded to whole tiles, on the device and without reading
anything back, so that a captured graph serves every routing. See MegaBlocks (arXiv 2211.15841).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from enginehouse_backends.llm.kernels.triton_elementwise import gate


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """Which rows each tile of a grouped product takes.

    rows: [tiles * tile_rows] int32, places in the flat [tokens * experts each] order, `num_rows` for padding
    experts: [tiles] int32, -1 for tiles that no expert needs.
    """

    rows: torch.Tensor
    experts: torch.Tensor
    tile_rows: int


def max_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """Tiles that any routing of so many rows can need: one more than full for each expert that has rows."""
    return min(num_rows, num_rows // tile_rows + num_experts)


def plan_expert_tiles(chosen: torch.Tensor, num_experts: int, tile_rows: int) -> ExpertTiles:
    """chosen: [tokens, experts each] integers. Fixed shapes throughout: fit for a captured graph.

    An expert id outside [0, num_experts) belongs to another rank and gets no tile.
    """
    flat = chosen.flatten().long()
    num_rows = flat.numel()
    experts = torch.arange(num_experts, device=flat.device)
    belongs = flat[:, None] == experts[None, :]
    counts = belongs.sum(0)
    tiles_each = (counts + tile_rows - 1) // tile_rows
    tile_ends = tiles_each.cumsum(0)
    num_tiles = max_tiles(num_rows, num_experts, tile_rows)
    tile_experts = torch.searchsorted(tile_ends, torch.arange(num_tiles, device=flat.device), right=True)
    # A row's place: the start of its expert's tiles plus how many rows of that expert come before it.
    rank_within = ((belongs.cumsum(0) - 1) * belongs).sum(1)
    mine = belongs.any(1)
    start = (tile_ends - tiles_each)[flat.clamp(0, num_experts - 1)] * tile_rows
    nowhere = num_tiles * tile_rows
    place = torch.where(mine, start + rank_within, nowhere)
    rows = torch.full((nowhere + 1,), num_rows, dtype=torch.int32, device=flat.device)
    rows.scatter_(0, place, torch.arange(num_rows, dtype=torch.int32, device=flat.device))
    tile_experts = torch.where(tile_experts < num_experts, tile_experts, -1).int()
    return ExpertTiles(rows[:nowhere], tile_experts, tile_rows)


@triton.jit
def _grouped_kernel(
    hidden,
    weight,
    out,
    tile_rows_of,
    tile_experts,
    routing,
    num_rows,
    num_columns,
    depth,
    hidden_stride,
    weight_expert_stride,
    weight_row_stride,
    out_stride,
    rows_per_token,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (tile, column block): tile's rows of `hidden` times the expert's weight, transposed.

    GATED: the weight holds gate rows, then up rows; the result is activation(gate) * up. WEIGHTED: each row
    is multiplied by its routing weight. `rows_per_token` rows of the flat order share a row of `hidden`.
    """
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile)
    if expert < 0:
        return
    flat = tl.load(tile_rows_of + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    row_inside = flat < num_rows
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_inside = columns < num_columns
    depths = tl.arange(0, BLOCK_K)
    hidden_at = hidden + (flat // rows_per_token).to(tl.int64)[:, None] * hidden_stride + depths[None, :]
    weight_at = weight + expert.to(tl.int64) * weight_expert_stride
    weight_at += columns.to(tl.int64)[None, :] * weight_row_stride + depths[:, None]
    up_at = weight_at + num_columns.to(tl.int64) * weight_row_stride
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        depth_inside = depths < depth - first
        mask = column_inside[None, :] & depth_inside[:, None]
        left = tl.load(hidden_at + first, mask=row_inside[:, None] & depth_inside[None, :], other=0.0)
        right = tl.load(weight_at + first, mask=mask, other=0.0)
        total = tl.dot(left, right.to(left.dtype), total, input_precision="ieee")
        if GATED:
            right = tl.load(up_at + first, mask=mask, other=0.0)
            up_total = tl.dot(left, right.to(left.dtype), up_total, input_precision="ieee")
    if GATED:
        # Rounded where separate products would leave their results.
        type: tl.constexpr = out.dtype.element_ty
        total = gate(total.to(type).to(tl.float32), ACTIVATION) * up_total.to(type).to(tl.float32)
    if WEIGHTED:
        total *= tl.load(routing + flat, mask=row_inside, other=0.0).to(tl.float32)[:, None]
    at = out + flat.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """gate_up: [experts, 2 * width, hidden], gate rows first · down: [experts, hidden, width]."""

    gate_up: torch.Tensor
    down: torch.Tensor
    activation: str = "silu"


def run_experts(
    hidden: torch.Tensor, chosen: torch.Tensor, routing: torch.Tensor, weights: ExpertWeights
) -> torch.Tensor:
    """hidden: [tokens, hidden]; chosen, routing: [tokens, experts each] → [tokens, hidden].

    Experts outside the weights' range count as zero: the ranks of a group sum their results.
    """
    num_tokens, experts_each = chosen.shape
    num_experts, double_width, hidden_size = weights.gate_up.shape
    if num_tokens == 0:
        return torch.zeros_like(hidden)
    num_rows = num_tokens * experts_each
    tile_rows = tile_rows_for(num_rows, num_experts)
    tiles = plan_expert_tiles(chosen, num_experts, tile_rows)
    inner = hidden.new_empty((num_rows, double_width // 2))
    # Zeros, not empty: rows of experts that live elsewhere are written by nobody.
    out = hidden.new_zeros((num_rows, hidden_size), dtype=torch.float32)
    routing = routing.reshape(-1)
    _launch(hidden, weights.gate_up, inner, tiles, routing, experts_each, weights.activation)
    _launch(inner, weights.down, out, tiles, routing, 1, "")
    return out.view(num_tokens, experts_each, hidden_size).sum(1).to(hidden.dtype)


def tile_rows_for(num_rows: int, num_experts: int) -> int:
    """16 rows while experts get few each (decoding reads weights, not rows), 64 or 128 for prefill."""
    average = num_rows / num_experts
    return 16 if average <= 16 else 64 if average <= 96 else 128


def _launch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    tiles: ExpertTiles,
    routing: torch.Tensor,
    rows_per_token: int,
    activation: str,
) -> None:
    num_columns = out.shape[1]
    block_n = 128 if not activation or tiles.tile_rows <= 16 else 64
    block_n = min(block_n, max(triton.next_power_of_2(num_columns), 16))
    block_k = min(64, max(triton.next_power_of_2(hidden.shape[1]), 16))
    _grouped_kernel[(tiles.experts.shape[0], triton.cdiv(num_columns, block_n))](
        hidden,
        weight,
        out,
        tiles.rows,
        tiles.experts,
        routing,
        routing.shape[0],
        num_columns,
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        weight.stride(1),
        out.stride(0),
        rows_per_token,
        GATED=bool(activation),
        ACTIVATION=activation,
        WEIGHTED=not activation,
        BLOCK_M=tiles.tile_rows,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4 if tiles.tile_rows < 128 else 8,
        num_stages=3,
    )
