"""Rounds dense weights to codes: each group to the nearest of evenly spaced values, the scale by least squares.

No data is needed. A checkpoint that was calibrated (GPTQ, AWQ) is better at four bits; see docs/quantization.md
for what rounding costs.
"""

from __future__ import annotations

import torch

from enginehouse_backends.llm.quantization.codes import Codes

_SHRINKAGES = (0.94, 0.87, 0.8)
"""Of the scale at which a group's largest value is still in range; clipping it can cost less than coarser steps."""


_SLICE_ELEMENTS = 1 << 18
"""Rounded at a time: the intermediate values stay in the cache."""


def round_weight(weight: torch.Tensor, bits: int, group_size: int) -> Codes:
    """weight: [outputs, inputs] of any float type. Symmetric: the zero is the middle code for all."""
    outputs, inputs = weight.shape
    groups = -(-inputs // group_size)
    codes = torch.empty((outputs, groups * group_size), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((outputs, groups), device=weight.device)
    step = outputs if weight.is_cuda else max(_SLICE_ELEMENTS // inputs, 1)
    for first in range(0, outputs, step):
        rows = slice(first, first + step)
        padded = torch.nn.functional.pad(weight[rows].float(), (0, -inputs % group_size))
        found, scales[rows] = _round_groups(padded.view(-1, groups, group_size), bits)
        codes[rows] = found.flatten(1)
    return Codes(codes[:, :inputs].contiguous(), scales, None, bits, group_size, 1 << (bits - 1))


def _round_groups(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """values: [outputs, groups, group size] → codes alike as uint8, scales [outputs, groups]."""
    middle = 1 << (bits - 1)
    # The negative side has one code more: let the value of largest size fall on it.
    extreme = values.gather(2, values.abs().argmax(2, keepdim=True)).squeeze(2)
    full = extreme / -middle
    full = torch.where(full == 0, torch.ones_like(full), full)
    best_codes, best_scales = _fit(values, full, middle)
    if bits == 8:
        return (best_codes + middle).to(torch.uint8), best_scales
    best_error = _error(values, best_codes, best_scales)
    for shrinkage in _SHRINKAGES:
        codes, scales = _fit(values, full * shrinkage, middle)
        error = _error(values, codes, scales)
        better = error < best_error
        best_codes = torch.where(better[..., None], codes, best_codes)
        best_scales = torch.where(better, scales, best_scales)
        best_error = torch.minimum(error, best_error)
    return (best_codes + middle).to(torch.uint8), best_scales


def _fit(values: torch.Tensor, scales: torch.Tensor, middle: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes at these scales, and the scales that fit those codes best."""
    codes = (values / scales[..., None]).round_().clamp_(-middle, middle - 1)
    dot, norm = torch.linalg.vecdot(codes, values), torch.linalg.vecdot(codes, codes)
    return codes, torch.where(norm > 0, dot / norm.clamp_min(1e-30), scales)


def _error(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (codes * scales[..., None]).sub_(values).square_().sum(2)
