"""Decides what a linear gets: the checkpoint's own quantized weights, dense ones rounded on the way in, or neither.

Detection is by tensor: a linear is quantized if its quantized tensors are there. `quantization_config` tells
what tensors can't, and lets unknown methods be refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from enginehouse.errors import InvalidArgument, Unsupported
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.layers import (
    Build,
    LinearKernel,
    LinearSpec,
    LoadLinear,
    Part,
    Split,
    output_range,
    read_bias_share,
    read_share,
)
from enginehouse_backends.llm.quantization.codes import Codes, join_outputs
from enginehouse_backends.llm.quantization.formats import FP8, Fp8Codes, read_quantized
from enginehouse_backends.llm.quantization.linears import Place, make_dense, make_linear
from enginehouse_backends.llm.quantization.rounding import round_weight

_METHODS = ("gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "bitsandbytes")
_ROUNDINGS = ("int8", "int4", "fp8")
_ROUNDED_GROUP = {"int8": 128, "int4": 32}
_HEAD_ROUNDING = {"int4": "int8"}
"""The head is the last to lose precision: its errors go straight into the logits."""


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """checkpoint: config.json's quantization_config, {} if there is none · rounding: "" or one of _ROUNDINGS."""

    checkpoint: Mapping[str, Any]
    rounding: str = ""

    @property
    def is_active(self) -> bool:
        return bool(self.checkpoint or self.rounding)


def plan_quantization(config: Mapping[str, Any], asked: str) -> QuantizationPlan:
    """`asked` is the setting `quantization`: "", a way of rounding, or the name of the checkpoint's own method.

    Raises Unsupported for a method that isn't known, InvalidArgument for a setting that contradicts config.json.
    """
    text = config.get("text_config") or {}
    found: Mapping[str, Any] = config.get("quantization_config") or text.get("quantization_config") or {}
    found = found or config.get("compression_config") or {}
    method = str(found.get("quant_method", "")).lower().replace("_", "-").replace("fbgemm-fp8", "fbgemm_fp8")
    if found and method not in _METHODS:
        raise Unsupported(f"quantization method '{method}' is not supported; known are {', '.join(_METHODS)}")
    asked = asked.lower().replace("_", "-")
    if asked in ("", "none", "auto", method):
        return QuantizationPlan(found)
    if asked in _ROUNDINGS and not found:
        return QuantizationPlan({}, asked)
    if asked in _ROUNDINGS:
        raise InvalidArgument(
            f"'quantization: {asked}' asks to round a checkpoint that is quantized by '{method}' already"
        )
    raise InvalidArgument(
        f"'quantization: {asked}' is not possible: the checkpoint is "
        f"{f'quantized by {method!r}' if found else 'not quantized'}; rounding knows {', '.join(_ROUNDINGS)}"
    )


def quantized_loader(plan: QuantizationPlan, place: Place, otherwise: LoadLinear) -> LoadLinear:
    """`otherwise` loads linears that stay as they are."""

    def load(spec: LinearSpec, checkpoint: Checkpoint, build: Build) -> LinearKernel:
        parts = [_read_part(part, spec, checkpoint, build, plan) for part in spec.parts]
        if all(part is None for part in parts):
            rounding = _rounding_of(spec, plan)
            if not rounding:
                return otherwise(spec, checkpoint, build)
            parts = [_round_part(part, spec, checkpoint, build, rounding) for part in spec.parts]
        weight = _joined(parts, spec, checkpoint, build)
        bias = None
        if spec.bias:
            bias = torch.cat([read_bias_share(checkpoint, part, spec, build) for part in spec.parts])
        _account(spec, checkpoint, build)
        if isinstance(weight, torch.Tensor):
            return make_dense(weight, bias, place, build.dtype)
        return make_linear(weight, bias, place, build.dtype, build.device)

    return load


def read_plain(checkpoint: Checkpoint, name: str, shape: tuple[int, int], config: Mapping[str, Any]) -> torch.Tensor:
    """The weight `name` as floats, dequantized if need be: for parts that have no quantized kernel."""
    found = read_quantized(checkpoint, name, shape, config.get("quantization_config") or {})
    return checkpoint.tensor(f"{name}.weight", shape) if found is None else found.dequantize()


def _read_part(
    part: Part, spec: LinearSpec, checkpoint: Checkpoint, build: Build, plan: QuantizationPlan
) -> Codes | Fp8Codes | None:
    """This rank's share of a part's quantized weight."""
    if not plan.checkpoint:
        return None
    stored = (part.num_stored_rows, spec.in_features)
    weight = read_quantized(checkpoint, part.name, stored, plan.checkpoint)
    if weight is None:
        return None
    first, count = part.first_row, part.out_features
    if spec.split is Split.OUTPUTS:
        start, count = output_range(part, build)
        first += start
    columns = build.group.share(spec.in_features) if spec.split is Split.INPUTS else (0, spec.in_features)
    if isinstance(weight, Codes):
        return weight.outputs(first, count).inputs(*columns, part.name)
    return weight.share((first, count), columns, part.name)


def _rounding_of(spec: LinearSpec, plan: QuantizationPlan) -> str:
    is_head = spec.name.endswith(("lm_head", "embed_tokens"))
    return _HEAD_ROUNDING.get(plan.rounding, plan.rounding) if is_head else plan.rounding


def _round_part(part: Part, spec: LinearSpec, checkpoint: Checkpoint, build: Build, rounding: str) -> Codes | Fp8Codes:
    dense = read_share(checkpoint, part, spec, build).to(build.device)
    if rounding == "fp8":
        scales = dense.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 448.0
        return Fp8Codes((dense.float() / scales).to(FP8), scales)
    group = _ROUNDED_GROUP[rounding]
    group = group if dense.shape[1] % group == 0 else 32
    return round_weight(dense, 8 if rounding == "int8" else 4, group)


def _joined(
    parts: list[Codes | Fp8Codes | None], spec: LinearSpec, checkpoint: Checkpoint, build: Build
) -> Codes | Fp8Codes | torch.Tensor:
    """One weight; plain floats where the parts can't be joined as they are."""
    codes = [part for part in parts if isinstance(part, Codes)]
    if len(codes) == len(parts):
        return join_outputs(codes, spec.name)
    in_fp8 = [part for part in parts if isinstance(part, Fp8Codes)]
    if len(in_fp8) == len(parts):
        joined = _join_fp8(in_fp8)
        if joined is not None:
            return joined
    plain = [
        read_share(checkpoint, part, spec, build) if weight is None else weight.dequantize()
        for part, weight in zip(spec.parts, parts, strict=True)
    ]
    return torch.cat([part.to(build.device, build.dtype) for part in plain])


def _join_fp8(parts: list[Fp8Codes]) -> Fp8Codes | None:
    """None where a block of rows would run across the border of two parts."""
    first = parts[0]
    weight = torch.cat([part.weight for part in parts])
    input_scale = None
    if all(part.input_scale is not None for part in parts):
        input_scale = max(part.input_scale or 0.0 for part in parts)
    if first.block is None:
        # one scale for a whole part becomes one for each of its rows
        scales = torch.cat([part.scales.expand(part.weight.shape[0], 1) for part in parts])
        return Fp8Codes(weight, scales.contiguous(), None, input_scale)
    if any(part.weight.shape[0] % first.block[0] for part in parts[:-1]) or len({part.block for part in parts}) > 1:
        return None
    return Fp8Codes(weight, torch.cat([part.scales for part in parts]), first.block)


def _account(spec: LinearSpec, checkpoint: Checkpoint, build: Build) -> None:
    """Tells progress, and lets go of the file's pages."""
    for name in {part.name for part in spec.parts}:
        for stored in [stored for stored in checkpoint.names if stored.startswith(f"{name}.")]:
            place = checkpoint.stored(stored)
            checkpoint.release(stored)
            build.on_loaded(place.stop - place.start)
