"""Attention on GPUs by the Triton kernels. A block is [layer, k or v, kv_head, token, head_dim], as in gather.py.

What a step does is on the device already (DeviceStep): attending launches kernels and nothing else, so that it
can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from enginehouse_backends.llm.attention import PLACE_BYTES, AttentionBackend, KvShape, StepBatch
from enginehouse_backends.llm.attention.triton_paged import (
    AttentionShape,
    DecodeWorkspace,
    PrefillPlan,
    SequencePlaces,
    decode_attention,
    prefill_attention,
)
from enginehouse_backends.llm.kernels.triton_rope import HeadNorm, PagedKv, TokenPlaces, rope_and_write
from enginehouse_backends.llm.layers import AttentionLayer, RmsNorm


@dataclass(slots=True)
class DeviceStep(StepBatch):
    """A step whose arrays are views of the device's step buffer. `prefill` is None if nobody computes several."""

    token_places: TokenPlaces = field(kw_only=True)
    sequence_places: SequencePlaces = field(kw_only=True)
    decode_sequences: torch.Tensor = field(kw_only=True)
    prefill: PrefillPlan | None = field(kw_only=True)
    num_splits: int = field(kw_only=True)
    workspace: DecodeWorkspace = field(kw_only=True)
    caches: list[PagedKv] = field(kw_only=True)
    """One a layer."""


class TritonAttention(AttentionBackend):
    """See module."""

    name = "triton"

    def attend(self, layer: AttentionLayer, qkv: torch.Tensor, step: StepBatch) -> torch.Tensor:
        assert isinstance(step, DeviceStep), "bug: this attention needs a step that is prepared for it"
        cache = step.caches[layer.index]
        query = qkv.new_empty((qkv.shape[0], layer.num_heads * layer.head_dim))
        out = torch.empty_like(query)
        norm = head_norm(layer.q_norm, layer.k_norm)
        rope_and_write(qkv, query, cache, step.token_places, layer.rope, num_query_heads=layer.num_heads, norm=norm)
        shape = AttentionShape(layer.scale, layer.softcap, layer.window)
        if step.prefill is not None:
            prefill_attention(query, cache, out, step.sequence_places, step.prefill, shape)
        decode_attention(
            query, cache, out, step.sequence_places, step.decode_sequences, shape, step.workspace, step.num_splits
        )
        return out


def head_norm(q_norm: RmsNorm | None, k_norm: RmsNorm | None) -> HeadNorm | None:
    if q_norm is None or k_norm is None:
        assert q_norm is k_norm, "bug: queries and keys are normed together or not at all"
        return None
    assert q_norm.epsilon == k_norm.epsilon, "bug: norms of queries and keys that differ"
    return HeadNorm(q_norm.weight, k_norm.weight, q_norm.epsilon)


def layer_caches(arena: torch.Tensor, shape: KvShape, scales: list[tuple[float, float]]) -> list[PagedKv]:
    """Views of the arena [bytes] for each layer. A block's number is its place: blocks overlap in these views.

    scales: of keys and values, one pair a layer.
    """
    elements = arena.view(shape.dtype)
    half = shape.num_kv_heads * shape.block_size * shape.head_dim
    stride = PLACE_BYTES // shape.dtype.itemsize
    num_places = (elements.numel() - 2 * shape.num_layers * half) // stride + 1
    size = (num_places, shape.block_size, shape.num_kv_heads, shape.head_dim)
    strides = (stride, shape.head_dim, shape.block_size * shape.head_dim, 1)
    return [
        PagedKv(
            elements.as_strided(size, strides, 2 * layer * half),
            elements.as_strided(size, strides, (2 * layer + 1) * half),
            key_scale,
            value_scale,
        )
        for layer, (key_scale, value_scale) in enumerate(scales)
    ]
