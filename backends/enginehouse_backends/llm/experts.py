"""A mixture of experts as a layer: the router, the experts' weights, and the two ways to run them.

On CUDA one grouped product runs all experts (kernels/triton_experts.py). Elsewhere experts that were chosen
run one after another. Ranks of a tensor-parallel group each hold a share of every expert's width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.layers import Build, Value
from enginehouse_backends.llm.models.llama import Mlp
from enginehouse_backends.llm.program import NotNative, Symbol
from enginehouse_backends.llm.quantization.loading import read_plain
from enginehouse_backends.llm.row_operations import ACTIVATIONS, TritonRows


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Where a checkpoint keeps an expert's parts: `<experts>.<index>.<gate|up|down>.weight`."""

    router: str
    experts: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    num_experts: int
    experts_per_token: int
    width: int
    """Columns between an expert's up and down."""
    normalize: bool
    """Whether the weights of a token's experts are scaled to sum to 1."""


class Experts(Mlp):
    """softmax(router x), the likeliest experts of each token, and the sum of their gated MLPs by weight."""

    router: torch.Tensor
    gate_up: torch.Tensor
    """[experts, 2 * width share, hidden], gate first"""
    down: torch.Tensor
    """[experts, hidden, width share]"""

    def __init__(self, build: Build, names: ExpertNames, sizes: ExpertSizes) -> None:
        self._build, self._names, self.sizes = build, names, sizes
        self._activation = build.architecture.activation

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        names, sizes = self._names, self.sizes
        hidden = self._build.architecture.hidden_size
        yield f"{names.router}.weight", (sizes.num_experts, hidden)
        for expert in range(sizes.num_experts):
            yield f"{names.experts}.{expert}.{names.gate}.weight", (sizes.width, hidden)
            yield f"{names.experts}.{expert}.{names.up}.weight", (sizes.width, hidden)
            yield f"{names.experts}.{expert}.{names.down}.weight", (hidden, sizes.width)

    def load(self, checkpoint: Checkpoint) -> None:
        build, names, sizes = self._build, self._names, self.sizes
        hidden = build.architecture.hidden_size
        router = checkpoint.tensor(f"{names.router}.weight", (sizes.num_experts, hidden))
        self.router = router.to(build.device, build.dtype, copy=True)
        first, share = build.group.share(sizes.width)
        self.gate_up = torch.empty((sizes.num_experts, 2 * share, hidden), dtype=build.dtype, device=build.device)
        self.down = torch.empty((sizes.num_experts, hidden, share), dtype=build.dtype, device=build.device)
        for expert in range(sizes.num_experts):
            prefix = f"{names.experts}.{expert}"
            parts = (
                (self.gate_up[expert, :share], names.gate, (sizes.width, hidden), 0),
                (self.gate_up[expert, share:], names.up, (sizes.width, hidden), 0),
                (self.down[expert], names.down, (hidden, sizes.width), 1),
            )
            for target, part, shape, axis in parts:
                stored = read_plain(checkpoint, f"{prefix}.{part}", shape, build.architecture.raw)
                target.copy_(stored.narrow(axis, first, share))
                build.on_loaded(stored.nbytes)

    def __call__(self, x: Value) -> Value:
        if isinstance(x, Symbol):
            raise NotNative("mixture of experts")
        chosen, weights = self.route(x)
        grouped = isinstance(self._build.rows, TritonRows) and ACTIVATIONS.get(self._activation) != "gelu"
        out = self._grouped(x, chosen, weights) if grouped else self._one_by_one(x, chosen, weights)
        return self._build.group.all_reduce(out)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, experts a token] each: which experts, and with what weight (float32)."""
        probabilities = F.linear(x, self.router).float().softmax(-1)
        weights, chosen = probabilities.topk(self.sizes.experts_per_token, dim=-1)
        if self.sizes.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights

    def _grouped(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        from enginehouse_backends.llm.kernels.triton_experts import ExpertWeights, run_experts

        return run_experts(x, chosen, weights, ExpertWeights(self.gate_up, self.down, ACTIVATIONS[self._activation]))

    def _one_by_one(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            inner = self._build.rows.gate(F.linear(x[tokens], self.gate_up[expert]), self._activation)
            result = F.linear(inner, self.down[expert]) * weights[tokens, place, None]
            out.index_add_(0, tokens, result.to(out.dtype))
        return out
