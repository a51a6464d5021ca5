"""Writes linears as other tools write them, from codes that are known: what the readers must find again.

Each writer follows its format's own description and shares no code with the readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Written:
    """`tensors` by their suffix behind the linear's name; `dense` is the weight that they stand for."""

    tensors: Tensors
    settings: Mapping[str, Any]
    dense: torch.Tensor


def save(folder: Path, linears: Mapping[str, Written | torch.Tensor]) -> None:
    """A checkpoint of these linears alone; plain tensors as `.weight`."""
    tensors: Tensors = {}
    for name, written in linears.items():
        if isinstance(written, torch.Tensor):
            tensors[f"{name}.weight"] = written
        else:
            tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in written.tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def _pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, n] → [rows, n * bits / 32] int32, the first value in the lowest bits."""
    rows = values.long().view(values.shape[0], -1, 32 // bits)
    words = torch.zeros(rows.shape[:2], dtype=torch.int64)
    for place in range(32 // bits):
        words |= rows[..., place] << (bits * place)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _levels(weight: torch.Tensor, bits: int, groups_of: torch.Tensor, asymmetric: bool) -> tuple[torch.Tensor, ...]:
    """Codes, scales and zeros by minimum and maximum of each group. `groups_of`: [inputs] each input's group."""
    num_groups, most = int(groups_of.max()) + 1, 2**bits - 1
    scales, zeros = torch.empty(weight.shape[0], num_groups), torch.empty(weight.shape[0], num_groups)
    for group in range(num_groups):
        part = weight[:, groups_of == group]
        if asymmetric:
            low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
            scales[:, group] = (high - low) / most
            zeros[:, group] = (-low / scales[:, group]).round()
        else:
            scales[:, group] = part.abs().amax(1) / (most // 2)
            zeros[:, group] = 2 ** (bits - 1)
    scales = scales.half().float()
    codes = (weight / scales[:, groups_of] + zeros[:, groups_of]).round().clamp(0, most)
    return codes, scales, zeros


def gptq(
    weight: torch.Tensor, bits: int = 4, group_size: int = 32, shuffled: bool = False, v2: bool = False
) -> Written:
    outputs, inputs = weight.shape
    groups_of = torch.arange(inputs) // group_size
    if shuffled:
        # which group an input belongs to is the same for linears that share their inputs
        groups_of = groups_of[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    codes, scales, zeros = _levels(weight, bits, groups_of, asymmetric=True)
    stored_zeros = zeros if v2 else (zeros - 1) % 2**bits
    tensors = {
        "qweight": _pack_words(codes.T.reshape(-1, 32 // bits, outputs).transpose(1, 2).reshape(-1, 32 // bits), bits)
        .view(-1, outputs),
        "qzeros": _pack_words(stored_zeros.T.contiguous(), bits),
        "scales": scales.T.half(),
        "g_idx": groups_of.int(),
    }  # fmt: skip
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": shuffled,
                "checkpoint_format": "gptq_v2" if v2 else "gptq"}  # fmt: skip
    return Written(tensors, settings, (codes - zeros[:, groups_of]) * scales[:, groups_of])


def awq(weight: torch.Tensor, group_size: int = 32) -> Written:
    groups_of = torch.arange(weight.shape[1]) // group_size
    codes, scales, zeros = _levels(weight, 4, groups_of, asymmetric=True)

    def pack(values: torch.Tensor) -> torch.Tensor:
        # of eight neighbouring outputs, the one that AWQ_PLACES names goes to each place of the word
        rows = values.T.reshape(values.shape[1], -1, 8)[..., list(AWQ_PLACES)]
        return _pack_words(rows.reshape(values.shape[1], -1), 4)

    tensors = {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales.T.half()}
    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return Written(tensors, settings, (codes - zeros[:, groups_of]) * scales[:, groups_of])


def compressed_tensors(weight: torch.Tensor, bits: int = 4, group_size: int = 32, asymmetric: bool = False) -> Written:
    outputs, inputs = weight.shape
    groups_of = torch.arange(inputs) // group_size
    codes, scales, zeros = _levels(weight, bits, groups_of, asymmetric)
    tensors = {
        "weight_packed": _pack_words(codes, bits),
        "weight_scale": scales.half(),
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if asymmetric:
        tensors["weight_zero_point"] = _pack_words(zeros.T.contiguous(), bits).T
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": not asymmetric,
        "strategy": "group",
        "group_size": group_size,
    }
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip
    return Written(tensors, settings, (codes - zeros[:, groups_of]) * scales[:, groups_of])


def int8_channels(weight: torch.Tensor) -> Written:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    return Written({"weight": codes, "weight_scale": scales}, settings, codes.float() * scales)


def bitsandbytes_int8(weight: torch.Tensor) -> Written:
    most = weight.abs().amax(1)
    codes = (weight * 127 / most[:, None]).round().to(torch.int8)
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return Written({"weight": codes, "SCB": most}, settings, codes.float() * most[:, None] / 127)


NF4 = torch.tensor([
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip


def bitsandbytes_nf4(weight: torch.Tensor, nested: bool = True) -> Written:
    """Blocks of 64; the blocks' maxima themselves as codes of a table of 256 where `nested`."""
    blocks = weight.reshape(-1, 64)
    most = blocks.abs().amax(1)
    codes = (blocks / most[:, None])[..., None].sub(NF4).abs().argmin(-1)
    pairs = codes.view(-1, 2)
    tensors = {"weight": (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None], "weight.quant_map": NF4.clone()}
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    if nested:
        table, offset = torch.linspace(-1, 1, 256), float(most.mean())
        outer = torch.stack([chunk.abs().max() for chunk in torch.split(most - offset, 256)])
        spread = outer[torch.arange(len(most)) // 256]
        maxima = ((most - offset) / spread)[:, None].sub(table).abs().argmin(1)
        tensors |= {"weight.absmax": maxima.to(torch.uint8), "weight.nested_absmax": outer}
        tensors["weight.nested_quant_map"] = table
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        most = table[maxima] * spread + offset
    else:
        tensors["weight.absmax"] = most
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return Written(tensors, settings, (NF4[codes] * most[:, None]).view_as(weight))


def fp8(weight: torch.Tensor, kind: str) -> Written:
    """kind: tensor, channel or block."""
    settings: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if kind == "block":
        rows, columns = 128, 128
        settings["weight_block_size"] = [rows, columns]
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        tiles = padded.view(padded.shape[0] // rows, rows, -1, columns)
        scales = tiles.abs().amax((1, 3)) / 448
        spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        spread = spread[: weight.shape[0], : weight.shape[1]]
        codes = (weight / spread).to(torch.float8_e4m3fn)
        return Written({"weight": codes, "weight_scale_inv": scales}, settings, codes.float() * spread)
    scales = weight.abs().amax(1, keepdim=True) / 448 if kind == "channel" else weight.abs().max() / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return Written({"weight": codes, "weight_scale": scales}, settings, codes.float() * scales)


FORMATS: Mapping[str, Callable[[torch.Tensor], Written]] = {
    "gptq": gptq,
    "gptq reordered": lambda weight: gptq(weight, shuffled=True),
    "gptq v2": lambda weight: gptq(weight, v2=True),
    "gptq 8 bits": lambda weight: gptq(weight, bits=8),
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "compressed-tensors with zeros": lambda weight: compressed_tensors(weight, asymmetric=True),
    "compressed-tensors 8 bits": lambda weight: compressed_tensors(weight, bits=8),
    "int8 by channel": int8_channels,
    "bitsandbytes int8": bitsandbytes_int8,
    "bitsandbytes nf4": bitsandbytes_nf4,
    "bitsandbytes nf4, not nested": lambda weight: bitsandbytes_nf4(weight, nested=False),
    "fp8 by tensor": lambda weight: fp8(weight, "tensor"),
    "fp8 by channel": lambda weight: fp8(weight, "channel"),
    "fp8 by block": lambda weight: fp8(weight, "block"),
}
