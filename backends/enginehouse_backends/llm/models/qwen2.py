"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from enginehouse_backends.llm.models.llama import LlamaModel


class Qwen2Model(LlamaModel):
    """See module."""

    def qkv_bias(self) -> bool:
        return True
