"""Triton kernels between the matrix products: RMS norm with the residual added, and gated activations.

Each row is read once and written once; arithmetic is float32 whatever the tensors hold. Nothing here
allocates, so a captured graph may replay them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(
    hidden,
    residual,
    weight,
    out,
    hidden_stride,
    residual_stride,
    out_stride,
    num_columns,
    epsilon,
    weight_offset,
    ADD_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    value = tl.load(hidden + row * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD_RESIDUAL:
        at = residual + row * residual_stride + columns
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        # The sum is rounded to the residual's type before the norm reads it, as a separate add would do.
        value = value.to(residual.dtype.element_ty).to(tl.float32)
        tl.store(at, value.to(residual.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / num_columns + epsilon)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
    tl.store(out + row * out_stride + columns, (value * scale * gain).to(out.dtype.element_ty), mask=inside)


def rms_norm(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """hidden: [rows, columns], last axis contiguous. With `residual` the sum of both is normed and left
    there. `weight_offset` 1.0 is Gemma's spelling of the gain.
    """
    out = torch.empty_like(hidden) if out is None else out
    rows, columns = hidden.shape
    if rows == 0:
        return out
    block = triton.next_power_of_2(columns)
    _rms_norm_kernel[(rows,)](
        hidden,
        hidden if residual is None else residual,
        weight,
        out,
        hidden.stride(0),
        hidden.stride(0) if residual is None else residual.stride(0),
        out.stride(0),
        columns,
        epsilon,
        weight_offset,
        ADD_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out


@triton.jit
def tanh(x):
    # From exp, so that the interpreter runs it too. Beyond 15 it is 1 in float32, and exp could overflow.
    return 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(x, 15.0)) + 1.0)


@triton.jit
def gate(value, ACTIVATION: tl.constexpr):
    """The gate's activation in float32: "silu" or "gelu_tanh"."""
    if ACTIVATION == "silu":
        return value / (1.0 + tl.exp(-value))
    return 0.5 * value * (1.0 + tanh(0.7978845608028654 * (value + 0.044715 * value * value * value)))


@triton.jit
def _gated_kernel(
    gate_up,
    out,
    in_stride,
    out_stride,
    num_columns,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    at = gate_up + row * in_stride + columns
    gated = gate(tl.load(at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    value = gated * tl.load(at + num_columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), mask=inside)


def gated_activation(gate_up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """gate_up: [rows, 2 * columns], gate first → [rows, columns] = activation(gate) * up."""
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, columns)) if out is None else out
    if rows == 0:
        return out
    block = min(triton.next_power_of_2(columns), 1024)
    _gated_kernel[(rows, triton.cdiv(columns, block))](
        gate_up,
        out,
        gate_up.stride(0),
        out.stride(0),
        columns,
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=4,
    )
    return out
