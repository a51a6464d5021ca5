"""The grouped product of a mixture of experts against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from enginehouse_backends.llm.kernels.triton_experts import (
    ExpertWeights,
    max_tiles,
    plan_expert_tiles,
    run_experts,
)

from .references import relative_error


def _expected(
    hidden: torch.Tensor, chosen: torch.Tensor, routing: torch.Tensor, weights: ExpertWeights
) -> torch.Tensor:
    out = torch.zeros_like(hidden, dtype=torch.float64)
    for token in range(hidden.shape[0]):
        for expert, share in zip(chosen[token].tolist(), routing[token].tolist(), strict=True):
            if 0 <= expert < weights.gate_up.shape[0]:
                gate, up = (weights.gate_up[expert].double() @ hidden[token].double()).chunk(2)
                out[token] += share * (weights.down[expert].double() @ (F.silu(gate) * up))
    return out


# float32 sums of up to a hundred terms; bfloat16 rounds the gated inner row
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize(("num_tokens", "experts_each"), [(1, 2), (37, 2), (9, 4)])
def test_experts(num_tokens: int, experts_each: int, dtype: torch.dtype, tolerance: float) -> None:
    num_experts, hidden_size, width = 6, 72, 40
    weights = ExpertWeights(
        (torch.randn(num_experts, 2 * width, hidden_size) / 8).to(dtype),
        (torch.randn(num_experts, hidden_size, width) / 6).to(dtype),
    )
    hidden = torch.randn(num_tokens, hidden_size).to(dtype)
    chosen = torch.rand(num_tokens, num_experts).topk(experts_each).indices
    routing = torch.rand(num_tokens, experts_each)
    found = run_experts(hidden, chosen, routing, weights)
    assert relative_error(found, _expected(hidden, chosen, routing, weights)) < tolerance


def test_experts_of_other_ranks_count_as_zero() -> None:
    weights = ExpertWeights(torch.randn(3, 32, 16), torch.randn(3, 16, 16))
    hidden, routing = torch.randn(5, 16), torch.rand(5, 2)
    chosen = torch.tensor([[0, 5], [4, 3], [2, -1], [1, 2], [7, 0]])
    found = run_experts(hidden, chosen, routing, weights)
    assert relative_error(found, _expected(hidden, chosen, routing, weights)) < 3e-6
    assert (found[1] == 0).all()


@pytest.mark.parametrize("tile_rows", [16, 64])
def test_tiles_hold_every_row_once_with_its_expert(tile_rows: int) -> None:
    for num_tokens in (1, 3, 40, 200):
        chosen = torch.randint(0, 5, (num_tokens, 2))
        tiles = plan_expert_tiles(chosen, 5, tile_rows)
        assert tiles.experts.shape[0] == max_tiles(num_tokens * 2, 5, tile_rows)
        rows = tiles.rows.view(-1, tile_rows)
        found = rows[rows < chosen.numel()]
        assert sorted(found.tolist()) == list(range(chosen.numel()))
        for expert, members in zip(tiles.experts.tolist(), rows, strict=True):
            members = members[members < chosen.numel()].long()
            assert (chosen.flatten()[members] == expert).all()


def test_all_rows_at_one_expert_fit_the_tiles() -> None:
    chosen = torch.full((40, 1), 3)
    tiles = plan_expert_tiles(chosen, 4, 16)
    assert tiles.experts.tolist() == [3, 3, 3, -1, -1, -1]
