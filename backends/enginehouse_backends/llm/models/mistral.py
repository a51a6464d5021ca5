"""Mistral: Llama with a sliding window (which Architecture reads from config.json)."""

from __future__ import annotations

from enginehouse_backends.llm.models.llama import LlamaModel


class MistralModel(LlamaModel):
    """See module."""

    def qkv_bias(self) -> bool:
        return False
