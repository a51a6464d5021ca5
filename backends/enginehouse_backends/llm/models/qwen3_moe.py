"""Qwen3 with mixtures of experts in all or some of its layers."""

from __future__ import annotations

from enginehouse_backends.llm.experts import ExpertNames, Experts, ExpertSizes
from enginehouse_backends.llm.models.llama import Mlp
from enginehouse_backends.llm.models.qwen3 import Qwen3Model


class Qwen3MoeModel(Qwen3Model):
    """See module."""

    def make_mlp(self, index: int) -> Mlp:
        raw = self.build.architecture.raw
        num_experts = int(raw.get("num_experts") or raw.get("num_local_experts") or 0)
        every = int(raw.get("decoder_sparse_step", 1))
        if index in raw.get("mlp_only_layers", ()) or num_experts == 0 or (index + 1) % every:
            return super().make_mlp(index)
        prefix = f"model.layers.{index}.mlp"
        names = ExpertNames(f"{prefix}.gate", f"{prefix}.experts", "gate_proj", "up_proj", "down_proj")
        each, width = int(raw["num_experts_per_tok"]), int(raw["moe_intermediate_size"])
        normalize = bool(raw.get("norm_topk_prob", False))
        return Experts(self.build, names, ExpertSizes(num_experts, each, width, normalize))
