"""What the kernels must compute, written plainly in float64."""

from __future__ import annotations

import torch


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; infinite if anything is not a number."""
    found, expected = found.double(), expected.double()
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    causal: bool = True,
) -> torch.Tensor:
    """query: [q, heads, dim], key, value: [kv, kv heads, dim] of one sequence → [q, heads, dim] float64."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    query_position = torch.arange(len(key) - len(query), len(key))[:, None]
    key_position = torch.arange(len(key))[None, :]
    allowed = torch.ones(len(query), len(key), dtype=torch.bool)
    if causal:
        allowed &= key_position <= query_position
    if window:
        allowed &= key_position > query_position - window
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def rope(heads: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """heads: [tokens, heads, dim], the first rotary columns rotated, the others untouched. float64."""
    heads = heads.double().clone()
    rotary = cos_sin.shape[1]
    cosine, sine = cos_sin[positions.long()].double()[:, None].chunk(2, -1)
    if interleaved:
        even, odd = heads[..., 0:rotary:2].clone(), heads[..., 1:rotary:2].clone()
        heads[..., 0:rotary:2] = even * cosine - odd * sine
        heads[..., 1:rotary:2] = odd * cosine + even * sine
    else:
        first, second = heads[..., : rotary // 2].clone(), heads[..., rotary // 2 : rotary].clone()
        heads[..., : rotary // 2] = first * cosine - second * sine
        heads[..., rotary // 2 : rotary] = second * cosine + first * sine
    return heads


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float = 0.0) -> torch.Tensor:
    hidden = hidden.double()
    return hidden * (hidden.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * (weight.double() + offset)
