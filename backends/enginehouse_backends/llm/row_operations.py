"""What happens between matrix products, row by row: in torch anywhere, or by the Triton kernels on GPUs.

Which of the two is decided once, when a model is built (layers.Build.rows).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_tanh": "gelu_tanh", "gelu": "gelu",
}  # fmt: skip
"""Names of config.json's, by what they compute."""


class RowOperations(ABC):
    """Arithmetic is float32; results have the input's type."""

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor: ...

    @abstractmethod
    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of the sum, the sum). `residual` is used up: the sum may lie in its memory."""

    @abstractmethod
    def gate(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """[rows, 2 n] → [rows, n]: activation of the first half times the second."""


class TorchRows(RowOperations):
    """See module."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return (wide * scale * weight).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, epsilon), total

    def gate(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        match ACTIVATIONS.get(activation):
            case "silu":
                return F.silu(gate) * up
            case "gelu_tanh":
                return F.gelu(gate, approximate="tanh") * up
            case "gelu":
                return F.gelu(gate) * up
        raise NotImplementedError(f"activation '{activation}'")


class TritonRows(RowOperations):
    """See module. An activation without a kernel runs in torch."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        from enginehouse_backends.llm.kernels.triton_elementwise import rms_norm

        return rms_norm(x.contiguous(), weight, epsilon)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from enginehouse_backends.llm.kernels.triton_elementwise import rms_norm

        return rms_norm(x, weight, epsilon, residual=residual), residual

    def gate(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        from enginehouse_backends.llm.kernels.triton_elementwise import gated_activation

        kind = ACTIVATIONS.get(activation, "")
        if kind not in ("silu", "gelu_tanh"):
            return TorchRows().gate(gate_up, activation)
        return gated_activation(gate_up, kind)
