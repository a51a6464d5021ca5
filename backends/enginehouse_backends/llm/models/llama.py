"""Llama 2 and 3, and the plan that Mistral and Qwen share with it: pre-norm, rotary, gated MLP."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from enginehouse_backends.llm.attention import StepBatch
from enginehouse_backends.llm.layers import (
    AttentionLayer,
    Build,
    Embedding,
    GatedActivation,
    Layer,
    Linear,
    Part,
    RmsNorm,
    Split,
    Value,
    add,
    make_head,
    make_rope,
    select_rows,
)
from enginehouse_backends.llm.models import DecoderModel


class LlamaBlock(Layer):
    """One transformer layer. `model` says what its family does differently."""

    def __init__(self, model: LlamaModel, index: int, rope: torch.Tensor) -> None:
        build, qk_norm = model.build, model.qk_norm
        a, prefix = build.architecture, f"model.layers.{index}"
        heads = f"{prefix}.self_attn"
        self.input_norm = RmsNorm(build, f"{prefix}.input_layernorm", a.hidden_size)
        self.qkv = Linear(build, model.qkv_parts(heads), a.hidden_size, model.qkv_bias(), Split.OUTPUTS)
        q_norm = RmsNorm(build, f"{heads}.q_norm", a.head_dim) if qk_norm else None
        k_norm = RmsNorm(build, f"{heads}.k_norm", a.head_dim) if qk_norm else None
        self.attention = AttentionLayer(build, index, rope, q_norm, k_norm)
        output_bias = bool(a.raw.get("attention_bias", False)) and a.family == "LlamaForCausalLM"
        self.output = Linear(
            build,
            (Part(f"{heads}.o_proj", a.hidden_size),),
            a.query_size,
            bias=output_bias,
            split=Split.INPUTS,
        )
        self.mlp_norm = RmsNorm(build, f"{prefix}.post_attention_layernorm", a.hidden_size)
        self.mlp = model.make_mlp(index)

    def forward(self, x: Value, residual: Value | None, step: StepBatch | None) -> tuple[Value, Value]:
        """(the MLP's output, the residual that is still to be added to it)."""
        normed, residual = (self.input_norm(x), x) if residual is None else self.input_norm.add(x, residual)
        attended = self.attention(self.qkv(normed), step)
        normed, residual = self.mlp_norm.add(self.output(attended), residual)
        return self.mlp(normed), residual


def separate_qkv(build: Build, prefix: str) -> Sequence[Part]:
    a = build.architecture
    return (
        Part(f"{prefix}.q_proj", a.query_size, a.num_heads),
        Part(f"{prefix}.k_proj", a.kv_size, a.num_kv_heads),
        Part(f"{prefix}.v_proj", a.kv_size, a.num_kv_heads),
    )


class Mlp(Layer):
    """What follows attention in a block: rows to rows."""

    @abstractmethod
    def __call__(self, x: Value) -> Value: ...


class GatedMlp(Mlp):
    """down(activation(gate x) * up x)"""

    def __init__(self, build: Build, prefix: str, gate_up: Sequence[Part]) -> None:
        a = build.architecture
        bias = bool(a.raw.get("mlp_bias", False))
        self.gate_up = Linear(build, gate_up, a.hidden_size, bias, Split.OUTPUTS, paired=True)
        self.activation = GatedActivation(build, a.activation)
        self.down = Linear(
            build,
            (Part(f"{prefix}.down_proj", a.hidden_size),),
            a.intermediate_size,
            bias=bias,
            split=Split.INPUTS,
        )

    def __call__(self, x: Value) -> Value:
        return self.down(self.activation(self.gate_up(x)))


class LlamaModel(DecoderModel):
    """Subclasses set what their family does differently."""

    qk_norm = False

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        a = build.architecture
        rope = make_rope(build)
        self.embedding = Embedding(build, "model.embed_tokens")
        self.blocks = [LlamaBlock(self, index, rope) for index in range(a.num_layers)]
        self.norm = RmsNorm(build, "model.norm", a.hidden_size)
        self.head = make_head(build, "lm_head", self.embedding if a.tied_embeddings else None)

    def qkv_bias(self) -> bool:
        return bool(self.build.architecture.raw.get("attention_bias", False))

    def qkv_parts(self, prefix: str) -> Sequence[Part]:
        return separate_qkv(self.build, prefix)

    def gate_up_parts(self, prefix: str) -> Sequence[Part]:
        width = self.build.architecture.intermediate_size
        return Part(f"{prefix}.gate_proj", width), Part(f"{prefix}.up_proj", width)

    def make_mlp(self, index: int) -> Mlp:
        prefix = f"model.layers.{index}.mlp"
        return GatedMlp(self.build, prefix, self.gate_up_parts(prefix))

    def forward(self, tokens: Value, step: StepBatch | None) -> Value:
        x, residual = self.embedding(tokens), None
        for block in self.blocks:
            x, residual = block.forward(x, residual, step)
        last = x if residual is None else add(x, residual)
        return self.head(self.norm(select_rows(last, step)))
