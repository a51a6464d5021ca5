"""Mixtral: Llama whose MLPs are mixtures of experts."""

from __future__ import annotations

from enginehouse_backends.llm.experts import ExpertNames, Experts, ExpertSizes
from enginehouse_backends.llm.models.llama import LlamaModel, Mlp


class MixtralModel(LlamaModel):
    """See module."""

    def make_mlp(self, index: int) -> Mlp:
        a = self.build.architecture
        prefix = f"model.layers.{index}.block_sparse_moe"
        names = ExpertNames(f"{prefix}.gate", f"{prefix}.experts", gate="w1", up="w3", down="w2")
        num_experts, each = int(a.raw["num_local_experts"]), int(a.raw["num_experts_per_tok"])
        return Experts(self.build, names, ExpertSizes(num_experts, each, a.intermediate_size, normalize=True))
