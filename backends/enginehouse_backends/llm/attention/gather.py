"""Attention in plain torch: gathers a sequence's blocks and calls SDPA. Right everywhere, fast nowhere.

The reference for every other implementation, and the CPU's fallback where there is no compiler.
A block is [layer, k or v, kv_head, token, head_dim].
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from enginehouse_backends.llm.attention import PLACE_BYTES, AttentionBackend, StepBatch
from enginehouse_backends.llm.layers import AttentionLayer, RmsNorm


class GatherAttention(AttentionBackend):
    """See module."""

    name = "gather"

    def attend(self, layer: AttentionLayer, qkv: torch.Tensor, step: StepBatch) -> torch.Tensor:
        query, key, value = split_heads(layer, qkv, step.positions)
        blocks = _Blocks(step, layer.index)
        starts, lengths = step.query_starts.tolist(), step.context_lengths.tolist()
        spans = [slice(start, stop) for start, stop in pairwise(starts)]
        for sequence, rows in enumerate(spans):
            blocks.write(sequence, step.positions[rows], key[rows], value[rows])
        # only then: a sequence may read blocks that another one of this step has written
        outputs = []
        for sequence, (rows, length) in enumerate(zip(spans, lengths, strict=True)):
            keys, values = blocks.read(sequence, length)
            outputs.append(attend_one(layer, query[rows], keys, values, step.positions[rows]))
        return torch.cat(outputs).reshape(qkv.shape[0], -1)


def split_heads(
    layer: AttentionLayer, qkv: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, heads, dim], k and v [T, kv_heads, dim]; norms and rotary applied."""
    sizes = [
        layer.num_heads * layer.head_dim,
        layer.num_kv_heads * layer.head_dim,
        layer.num_kv_heads * layer.head_dim,
    ]
    query, key, value = (part.reshape(part.shape[0], -1, layer.head_dim) for part in torch.split(qkv, sizes, dim=-1))
    query = _rotate(_normed(query, layer.q_norm), layer.rope, positions)
    key = _rotate(_normed(key, layer.k_norm), layer.rope, positions)
    return query, key, value


def _normed(heads: torch.Tensor, norm: RmsNorm | None) -> torch.Tensor:
    if norm is None:
        return heads
    out = norm(heads)
    assert isinstance(out, torch.Tensor)
    return out


def _rotate(heads: torch.Tensor, rope: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    if rope is None:
        return heads
    dim = rope.shape[1]
    cos, sin = rope[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    turned, rest = heads[..., :dim].float(), heads[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def attend_one(
    layer: AttentionLayer,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """One sequence: query [T, heads, dim] at `positions` over keys and values [context, kv_heads, dim]."""
    distance = positions[:, None] - torch.arange(keys.shape[0], device=keys.device)[None, :]
    seen = distance >= 0
    if layer.window:
        seen &= distance < layer.window
    group = layer.num_heads // layer.num_kv_heads
    q, k, v = (t.transpose(0, 1) for t in (query, keys, values))
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    if not layer.softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=layer.scale).transpose(0, 1)
    scores = torch.tanh((q.float() @ k.float().mT) * layer.scale / layer.softcap) * layer.softcap
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1).to(v.dtype)
    return (weights @ v).transpose(0, 1)


class _Blocks:
    """One layer's keys and values, by sequence and position."""

    def __init__(self, step: StepBatch, layer_index: int) -> None:
        shape = step.kv_shape
        self._shape = shape
        self._elements = step.arena.view(shape.dtype)
        self._starts = step.block_places.long() * (PLACE_BYTES // shape.dtype.itemsize)
        self._half = shape.num_kv_heads * shape.block_size * shape.head_dim
        self._layer_offset = layer_index * 2 * self._half

    def _indices(self, sequence: int, positions: torch.Tensor) -> torch.Tensor:
        """[T, kv_heads, dim]: where each element of the keys lies; values are `_half` behind."""
        shape, device = self._shape, positions.device
        places = self._starts[sequence, positions.long() // shape.block_size] + self._layer_offset
        tokens = places + positions.long() % shape.block_size * shape.head_dim
        heads = torch.arange(shape.num_kv_heads, device=device) * (shape.block_size * shape.head_dim)
        return tokens[:, None, None] + heads[:, None] + torch.arange(shape.head_dim, device=device)

    def write(self, sequence: int, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        indices = self._indices(sequence, positions)
        self._elements[indices] = keys.to(self._shape.dtype)
        self._elements[indices + self._half] = values.to(self._shape.dtype)

    def read(self, sequence: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = self._indices(sequence, torch.arange(length, device=self._starts.device))
        return self._elements[indices], self._elements[indices + self._half]
