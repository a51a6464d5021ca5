"""Reads the weights of quantized checkpoints into codes or FP8: one function a format, told by tensor names.

What the checkpoint's `quantization_config` says is used only for what tensors can't tell. A linear whose plain
`.weight` is there (lm_head, usually) was left alone and is loaded as any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from enginehouse.errors import InvalidArgument, Unsupported
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.quantization.codes import Codes

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Fp8Codes:
    """weight: [outputs, inputs] float8_e4m3fn · scales: [outputs or 1, 1], or [row blocks, column blocks]."""

    weight: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, for block-wise weights."""
    input_scale: float | None = None
    """Fixed while calibrating; None measures each row of the inputs."""

    def share(self, rows: tuple[int, int], columns: tuple[int, int], name: str) -> Fp8Codes:
        """First and number of each. Raises Unsupported if a cut goes through a block."""
        (row, num_rows), (column, num_columns) = rows, columns
        weight = self.weight[row : row + num_rows, column : column + num_columns]
        if self.block is None:
            scales = self.scales if self.scales.shape[0] == 1 else self.scales[row : row + num_rows]
            return replace(self, weight=weight, scales=scales)
        height, width = self.block
        whole = weight.shape == self.weight.shape
        if not whole and (row % height or column % width):
            raise Unsupported(f"{name}: FP8 blocks of {height} by {width} can't be divided at {row}, {column}")
        blocks = (slice(row // height, -(-(row + num_rows) // height)),
                  slice(column // width, -(-(column + num_columns) // width)))  # fmt: skip
        return replace(self, weight=weight, scales=self.scales[blocks])

    def dequantize(self) -> torch.Tensor:
        scales = self.scales
        if self.block is not None:
            rows, columns = self.weight.shape
            scales = scales.repeat_interleave(self.block[0], 0)[:rows]
            scales = scales.repeat_interleave(self.block[1], 1)[:, :columns]
        return self.weight.float() * scales


Shape = tuple[int, int]
"""Outputs and inputs of the linear as stored."""


def read_quantized(
    checkpoint: Checkpoint, name: str, shape: Shape, settings: Mapping[str, Any]
) -> Codes | Fp8Codes | None:
    """The weight of the linear `name`, or None if it isn't quantized. `settings` is quantization_config.

    Raises InvalidArgument for tensors that don't fit together, Unsupported for a format that isn't known.
    """
    for suffix, read in _READERS.items():
        if f"{name}.{suffix}" in checkpoint:
            return read(checkpoint, name, shape, settings)
    weight = f"{name}.weight"
    if weight not in checkpoint:
        return None
    stored = checkpoint.stored(weight)
    if stored.dtype == FP8:
        return _read_fp8(checkpoint, name, shape, settings)
    if stored.dtype == torch.int8:
        return _read_int8(checkpoint, name, shape)
    return None


def _tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return checkpoint.tensor(name, shape)


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., words] → uint8 [..., words * (32 / bits)], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)


def _bits(settings: Mapping[str, Any], name: str) -> int:
    bits = int(settings.get("bits") or settings.get("w_bit") or 4)
    if bits not in (4, 8):
        raise Unsupported(f"{name}: weights of {bits} bits are not supported, only of 4 and 8")
    return bits


def _read_gptq_or_awq(checkpoint: Checkpoint, name: str, shape: Shape, settings: Mapping[str, Any]) -> Codes:
    if str(settings.get("quant_method", "gptq")).lower() == "awq":
        return _read_awq(checkpoint, name, shape, settings)
    return _read_gptq(checkpoint, name, shape, settings)


def _read_gptq(checkpoint: Checkpoint, name: str, shape: Shape, settings: Mapping[str, Any]) -> Codes:
    """qweight packs inputs, qzeros outputs; zeros are stored less one, but for gptq_v2."""
    outputs, inputs = shape
    bits = _bits(settings, name)
    per_word = 32 // bits
    qweight = _tensor(checkpoint, f"{name}.qweight", (inputs // per_word, outputs))
    scales = checkpoint.tensor(f"{name}.scales")
    groups = scales.shape[0]
    group_size = _group_size(inputs, groups, settings)
    zeros = _unpack(_tensor(checkpoint, f"{name}.qzeros", (groups, outputs // per_word)), bits)
    if str(settings.get("checkpoint_format", "gptq")) != "gptq_v2":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    codes = _unpack(qweight.T.contiguous(), bits)
    order = None
    if f"{name}.g_idx" in checkpoint:
        codes, order = _sort_by_group(codes, _tensor(checkpoint, f"{name}.g_idx", (inputs,)), group_size)
    return Codes(codes, scales.T.float().contiguous(), zeros.T.contiguous(), bits, group_size, order=order)


def _sort_by_group(
    codes: torch.Tensor, group_of_input: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    plain = torch.arange(len(group_of_input), dtype=group_of_input.dtype) // group_size
    if torch.equal(group_of_input, plain):
        return codes, None
    order = group_of_input.argsort(stable=True)
    return codes[:, order].contiguous(), order


def _group_size(inputs: int, groups: int, settings: Mapping[str, Any]) -> int:
    size = int(settings.get("group_size") or settings.get("q_group_size") or -1)
    size = inputs if size <= 0 else size
    if -(-inputs // size) != groups:
        raise InvalidArgument(f"{inputs} inputs in groups of {size} don't make the {groups} groups of the checkpoint")
    return size


_AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word of eight the output that belongs there is."""


def _read_awq(checkpoint: Checkpoint, name: str, shape: Shape, settings: Mapping[str, Any]) -> Codes:
    """Packs outputs, eight a word, interleaved."""
    outputs, inputs = shape
    if _bits(settings, name) != 4:
        raise Unsupported(f"{name}: AWQ weights have 4 bits")
    words = outputs // 8
    scales = checkpoint.tensor(f"{name}.scales")
    groups = scales.shape[0]

    def read(tensor: str, rows: int) -> torch.Tensor:
        unpacked = _unpack(_tensor(checkpoint, f"{name}.{tensor}", (rows, words)), 4)
        return unpacked.view(rows, words, 8)[..., _AWQ_ORDER].reshape(rows, outputs).T.contiguous()

    group_size = _group_size(inputs, groups, settings)
    return Codes(read("qweight", inputs), scales.T.float().contiguous(), read("qzeros", groups), 4, group_size)


def _read_packed(checkpoint: Checkpoint, name: str, shape: Shape, settings: Mapping[str, Any]) -> Codes:
    """compressed-tensors' pack-quantized: inputs packed, codes offset by the middle, zeros packed by outputs."""
    outputs, inputs = shape
    packed = checkpoint.tensor(f"{name}.weight_packed")
    words = packed.shape[1]
    bits = 4 if words == -(-inputs // 8) else 8
    if packed.shape != (outputs, -(-inputs * bits // 32)):
        raise Unsupported(f"{name}: packed weights of shape {list(packed.shape)} have neither 4 nor 8 bits")
    scales = checkpoint.tensor(f"{name}.weight_scale").float().view(outputs, -1)
    groups = scales.shape[1]
    group_size = inputs if groups == 1 else inputs // groups
    codes = _unpack(packed, bits)[:, :inputs]
    zeros = None
    if f"{name}.weight_zero_point" in checkpoint:
        stored = checkpoint.tensor(f"{name}.weight_zero_point")
        if stored.dtype == torch.int32:
            zeros = _unpack(stored.T.contiguous(), bits).T[:outputs].contiguous().view(outputs, groups)
        else:
            zeros = (stored.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).view(outputs, groups)
    order = None
    if f"{name}.weight_g_idx" in checkpoint:
        codes, order = _sort_by_group(codes, checkpoint.tensor(f"{name}.weight_g_idx"), group_size)
    return Codes(codes.contiguous(), scales, zeros, bits, group_size, 1 << (bits - 1), order=order)


def _read_int8(checkpoint: Checkpoint, name: str, shape: Shape) -> Codes:
    """compressed-tensors' int-quantized, and bitsandbytes' 8 bits (whose scales are called SCB)."""
    outputs, inputs = shape
    weight = _tensor(checkpoint, f"{name}.weight", shape)
    if f"{name}.SCB" in checkpoint:
        scales = _tensor(checkpoint, f"{name}.SCB", (outputs,)).float().view(outputs, 1) / 127.0
    else:
        scales = checkpoint.tensor(f"{name}.weight_scale").float().view(-1, 1).expand(outputs, 1).contiguous()
    codes = (weight.to(torch.int16) + 128).to(torch.uint8)
    return Codes(codes, scales, None, 8, inputs, 128)


def _read_fp8(checkpoint: Checkpoint, name: str, shape: Shape, settings: Mapping[str, Any]) -> Fp8Codes:
    outputs, inputs = shape
    weight = _tensor(checkpoint, f"{name}.weight", shape)
    if f"{name}.weight_scale_inv" in checkpoint:
        rows, columns = settings.get("weight_block_size") or (128, 128)
        blocks = (-(-outputs // rows), -(-inputs // columns))
        scales = _tensor(checkpoint, f"{name}.weight_scale_inv", blocks).float()
        return Fp8Codes(weight, scales, (int(rows), int(columns)))
    if f"{name}.weight_scale" not in checkpoint:
        raise InvalidArgument(f"{checkpoint.folder}: the FP8 weight of '{name}' has no scale")
    scales = checkpoint.tensor(f"{name}.weight_scale").float().reshape(-1, 1)
    if scales.shape[0] not in (1, outputs):
        raise InvalidArgument(f"{name}.weight_scale has {scales.shape[0]} scales for {outputs} outputs")
    fixed = f"{name}.input_scale"
    input_scale = float(checkpoint.tensor(fixed).max()) if fixed in checkpoint else None
    return Fp8Codes(weight, scales, None, input_scale)


def read_kv_scales(checkpoint: Checkpoint, num_layers: int) -> list[tuple[float, float]]:
    """Of keys and values in an FP8 cache, one pair a layer: what calibrated checkpoints say, else 1."""

    def scale(layer: int, what: str) -> float:
        name = f"model.layers.{layer}.self_attn.{what}_scale"
        return float(checkpoint.tensor(name).float().max()) if name in checkpoint else 1.0

    return [(scale(layer, "k"), scale(layer, "v")) for layer in range(num_layers)]


_NF4_STATE = "weight.quant_state.bitsandbytes__nf4"


def _read_nf4(checkpoint: Checkpoint, name: str, shape: Shape, settings: Mapping[str, Any]) -> Codes:
    """bitsandbytes: two codes a byte, the first in the high half, absolute maxima of blocks, maybe nested."""
    outputs, inputs = shape
    state = json.loads(bytes(checkpoint.tensor(f"{name}.{_NF4_STATE}").tolist()))
    block = int(state["blocksize"])
    if inputs % block:
        raise Unsupported(f"{name}: NF4 blocks of {block} run across rows of {inputs} inputs")
    packed = checkpoint.tensor(f"{name}.weight").view(torch.uint8).flatten()
    codes = torch.stack((packed >> 4, packed & 15), 1).view(outputs, inputs)
    scales = checkpoint.tensor(f"{name}.weight.absmax")
    if f"{name}.weight.nested_absmax" in checkpoint:
        nested = checkpoint.tensor(f"{name}.weight.nested_absmax").float()
        table = checkpoint.tensor(f"{name}.weight.nested_quant_map").float()
        spread = torch.arange(scales.numel()) // int(state["nested_blocksize"])
        scales = table[scales.flatten().long()] * nested[spread] + float(state["nested_offset"])
    table = checkpoint.tensor(f"{name}.weight.quant_map").float().clone()
    return Codes(codes, scales.float().view(outputs, inputs // block), None, 4, block, table=table)


_READERS: Mapping[str, Callable[[Checkpoint, str, Shape, Mapping[str, Any]], Codes | Fp8Codes]] = {
    "qweight": _read_gptq_or_awq,
    "weight_packed": _read_packed,
    _NF4_STATE: _read_nf4,
}
"""By the tensor that only that format has."""
