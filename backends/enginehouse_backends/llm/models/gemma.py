"""Gemma 2 and 3: norms before and after each half of a block, soft-capping (2), two rotary tables (3)."""

from __future__ import annotations

import torch

from enginehouse_backends.llm.attention import StepBatch
from enginehouse_backends.llm.layers import (
    AttentionLayer,
    Build,
    Embedding,
    Layer,
    Linear,
    Part,
    RmsNorm,
    Split,
    Value,
    make_head,
    make_rope,
    select_rows,
)
from enginehouse_backends.llm.models import DecoderModel
from enginehouse_backends.llm.models.llama import GatedMlp, separate_qkv
from enginehouse_backends.llm.rope import rope_table


class GemmaBlock(Layer):
    """One transformer layer. Every norm's gain is 1 + weight."""

    def __init__(self, build: Build, index: int, rope: torch.Tensor, qk_norm: bool) -> None:
        a, prefix = build.architecture, f"model.layers.{index}"
        heads, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"

        def norm(name: str, width: int = a.hidden_size) -> RmsNorm:
            return RmsNorm(build, f"{prefix}.{name}", width, offset=1.0)

        bias = bool(a.text.get("attention_bias", False))
        self.input_norm = norm("input_layernorm")
        self.qkv = Linear(build, separate_qkv(build, heads), a.hidden_size, bias, Split.OUTPUTS)
        self.attention = AttentionLayer(
            build,
            index,
            rope,
            norm("self_attn.q_norm", a.head_dim) if qk_norm else None,
            norm("self_attn.k_norm", a.head_dim) if qk_norm else None,
            scale=float(a.text["query_pre_attn_scalar"]) ** -0.5,
            softcap=float(a.text.get("attn_logit_softcapping") or 0.0),
        )
        output = (Part(f"{heads}.o_proj", a.hidden_size),)
        self.output = Linear(build, output, a.query_size, bias, Split.INPUTS)
        self.attended_norm = norm("post_attention_layernorm")
        self.mlp_norm = norm("pre_feedforward_layernorm")
        gate_up = (Part(f"{mlp}.gate_proj", a.intermediate_size), Part(f"{mlp}.up_proj", a.intermediate_size))
        self.mlp = GatedMlp(build, mlp, gate_up)
        self.output_norm = norm("post_feedforward_layernorm")

    def forward(self, x: Value, residual: Value | None, step: StepBatch | None) -> tuple[Value, Value]:
        """(the block's output, the residual that is still to be added to it)."""
        normed, residual = (self.input_norm(x), x) if residual is None else self.input_norm.add(x, residual)
        attended = self.attended_norm(self.output(self.attention(self.qkv(normed), step)))
        normed, residual = self.mlp_norm.add(attended, residual)
        return self.output_norm(self.mlp(normed)), residual


class GemmaModel(DecoderModel):
    """See module."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        a = build.architecture
        rope = make_rope(build)
        local = rope
        if a.local_rope is not None:
            local = rope_table(a.local_rope, build.max_positions or a.max_positions).to(build.device)
        qk_norm = a.family.startswith("Gemma3")
        # The factor is rounded to the weights' type, as in training.
        factor = float(torch.tensor(a.hidden_size**0.5, dtype=build.dtype))
        self.embedding = Embedding(build, "model.embed_tokens", factor)
        self.blocks = [
            GemmaBlock(build, index, local if a.sliding_windows[index] else rope, qk_norm)
            for index in range(a.num_layers)
        ]
        self.norm = RmsNorm(build, "model.norm", a.hidden_size, offset=1.0)
        softcap = float(a.text.get("final_logit_softcapping") or 0.0)
        self.head = make_head(build, "lm_head", self.embedding if a.tied_embeddings else None, softcap)

    def forward(self, tokens: Value, step: StepBatch | None) -> Value:
        x, residual = self.embedding(tokens), None
        for block in self.blocks:
            x, residual = block.forward(x, residual, step)
        normed, _ = self.norm.add(x, residual) if residual is not None else (self.norm(x), x)
        return self.head(select_rows(normed, step))
