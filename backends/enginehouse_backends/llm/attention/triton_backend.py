"""Attention on GPUs. A block is [layer, k or v, kv_head, token, head_dim], as in gather.py.

Rotation and writing are always the Triton kernels'; attending is theirs or another library's (alternatives.py), as
choosing.py has found. What a step does is on the device already (DeviceStep): attending launches kernels and nothing
else, so that it can be captured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from enginehouse_backends.llm.runner import StepInput


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
    given: StepInput | None = field(kw_only=True, default=None)
    """What the host knows of it; None while a graph is captured."""
    number: int = field(kw_only=True, default=0)
    _page_table: torch.Tensor | None = field(kw_only=True, default=None)

    @property
    def page_table(self) -> torch.Tensor:
        """[S, blocks] int32: `block_places` by sequence. Made once a step, for kernels that want it so."""
        if self._page_table is None:
            places = self.sequence_places
            self._page_table = places.block_table.index_select(0, places.table_rows.long())
        return self._page_table


class PagedKernels(ABC):
    """Attends over blocks that are written already."""

    name: str
    is_capturable = True
    """Whether a graph can hold it."""

    @abstractmethod
    def attend(self, query: torch.Tensor, cache: PagedKv, step: DeviceStep, shape: AttentionShape) -> torch.Tensor:
        """query: [T, query heads * head_dim] → the same. Rows of padding may hold anything."""


class TritonKernels(PagedKernels):
    """Ours."""

    name = "triton"

    def attend(self, query: torch.Tensor, cache: PagedKv, step: DeviceStep, shape: AttentionShape) -> torch.Tensor:
        out = torch.empty_like(query)
        if step.prefill is not None:
            prefill_attention(query, cache, out, step.sequence_places, step.prefill, shape)
        decode_attention(
            query, cache, out, step.sequence_places, step.decode_sequences, shape, step.workspace, step.num_splits
        )
        return out


class DeviceAttention(AttentionBackend):
    """`prompts` attends in steps in which somebody computes several tokens, `decoding` in all others."""

    name = "device"

    def __init__(self) -> None:
        self.prompts: PagedKernels = TritonKernels()
        self.decoding: PagedKernels = self.prompts

    def attend(self, layer: AttentionLayer, qkv: torch.Tensor, step: StepBatch) -> torch.Tensor:
        assert isinstance(step, DeviceStep), "bug: this attention needs a step that is prepared for it"
        cache = step.caches[layer.index]
        query = qkv.new_empty((qkv.shape[0], layer.num_heads * layer.head_dim))
        norm = head_norm(layer.q_norm, layer.k_norm)
        rope_and_write(qkv, query, cache, step.token_places, layer.rope, num_query_heads=layer.num_heads, norm=norm)
        kernels = self.decoding if step.prefill is None else self.prompts
        return kernels.attend(query, cache, step, AttentionShape(layer.scale, layer.softcap, layer.window))


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
