"""Phi-3, Phi-3.5 and Phi-4: Llama whose checkpoint holds qkv and gate_up already fused."""

from __future__ import annotations

from collections.abc import Sequence

from enginehouse_backends.llm.layers import Part
from enginehouse_backends.llm.models.llama import LlamaModel


class Phi3Model(LlamaModel):
    """See module."""

    def qkv_parts(self, prefix: str) -> Sequence[Part]:
        a = self.build.architecture
        return Part(f"{prefix}.qkv_proj", a.query_size + 2 * a.kv_size).cut(
            (a.query_size, a.num_heads), (a.kv_size, a.num_kv_heads), (a.kv_size, a.num_kv_heads)
        )

    def gate_up_parts(self, prefix: str) -> Sequence[Part]:
        width = self.build.architecture.intermediate_size
        return Part(f"{prefix}.gate_up_proj", 2 * width).cut((width, 0), (width, 0))
