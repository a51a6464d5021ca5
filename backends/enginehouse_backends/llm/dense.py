"""Linears with plain weights in torch: on any device, and packed by oneDNN on CPUs where torch has the ops.

The ops are private to torch (`torch.ops.mkldnn`), so they are tested for; without them F.linear serves.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.layers import Build, LinearKernel, LinearSpec, read_bias_share, read_share

_PACK_ROWS = 32
"""One pack made for so many rows serves every number of rows."""


class DenseLinear(LinearKernel):
    """y = x W^T + b in torch."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self.out_features = weight.shape[0]
        self.num_bytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        return F.embedding(numbers, self._weight)


class PackedLinear(LinearKernel):
    """The same through oneDNN with weights in its own layout: up to four times the bandwidth at few rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        self._bias = bias
        self.out_features = weight.shape[0]
        self.num_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


def load_plain(spec: LinearSpec, checkpoint: Checkpoint, build: Build) -> LinearKernel:
    """As `load_dense`, never packed: what runs on GPUs."""
    return DenseLinear(*read_dense(spec, checkpoint, build))


def load_dense(spec: LinearSpec, checkpoint: Checkpoint, build: Build) -> LinearKernel:
    """The parts joined along their outputs, in `build.dtype` on `build.device`."""
    weight, bias = read_dense(spec, checkpoint, build)
    if build.device.type == "cpu" and can_pack(build.dtype):
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)


def read_dense(spec: LinearSpec, checkpoint: Checkpoint, build: Build) -> tuple[torch.Tensor, torch.Tensor | None]:
    """This rank's weight [out, in] and bias [out], copied out of the file."""
    weights, biases = [], []
    for part in spec.parts:
        weights.append(read_share(checkpoint, part, spec, build).to(build.device, build.dtype))
        if spec.bias:
            biases.append(read_bias_share(checkpoint, part, spec, build).to(build.device, build.dtype))
    weight = torch.cat(weights) if len(weights) > 1 else weights[0].clone()
    bias = torch.cat(biases) if biases else None
    for part in spec.parts:
        itemsize = checkpoint.stored(f"{part.name}.weight").dtype.itemsize
        build.on_loaded(part.out_features * spec.in_features * itemsize)
    return weight, bias


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch packs and multiplies weights of that type. Measured by doing it once."""
    probe = torch.eye(16).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(probe, _PACK_ROWS)
        out = torch.ops.mkldnn._linear_pointwise(probe, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(torch.equal(out, probe))
