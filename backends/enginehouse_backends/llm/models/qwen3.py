"""Qwen3 (dense): Llama with a norm on each head of q and k."""

from __future__ import annotations

from enginehouse_backends.llm.models.llama import LlamaModel


class Qwen3Model(LlamaModel):
    """See module."""

    qk_norm = True
