"""Linears whose weights are codes of 4 or 8 bits, for the native CPU kernels (kernels/coded.hpp)."""

from __future__ import annotations

import torch

from enginehouse.errors import Unsupported
from enginehouse_backends.llm.kernels.library import CODED_BLOCK, UNIT, UNIT_BYTES, NativeCodes, library
from enginehouse_backends.llm.layers import LinearKernel
from enginehouse_backends.llm.native_linear import NATIVE_TYPES, NativeMemory
from enginehouse_backends.llm.program import Symbol
from enginehouse_backends.llm.quantization.codes import Codes, regroup

_GROUPS = (32, 64, 128)
"""Inputs to a scale that the kernels know; larger groups are divided."""
_SLICE_OUTPUTS = 64 * CODED_BLOCK


class NativeCodedLinear(LinearKernel):
    """Runs inside a native program, and by itself where a model is run operation by operation."""

    def __init__(self, codes: Codes, bias: torch.Tensor | None) -> None:
        """`bias`: [outputs] of any float type. Raises Unsupported for groups that the kernels don't know."""
        if codes.table is not None:
            raise Unsupported("codes with a table have no CPU kernel")
        codes = regroup(codes, _kernel_group(codes.group_size))
        self.out_features, self.in_features = codes.num_outputs, codes.num_inputs
        units_in_group = codes.group_size // UNIT
        groups = -(-self.in_features // codes.group_size)
        self.num_units = groups * units_in_group
        multiplier = float(codes.scales.abs().max()) or 1.0
        # scaled so that the largest is 1: half precision then holds scales down to 6e-5 of it in full
        self._scales = _blocked(codes.scales / multiplier).half()
        self._zeros = None if codes.zeros is None else _blocked(codes.zeros)
        self._bias = None if bias is None else bias.float().contiguous()
        self._order = None if codes.order is None else codes.order.int().contiguous()
        self._packed = _pack(codes)
        small = (self._scales, self._zeros, self._bias, self._order)
        self.num_bytes = self._packed.num_bytes + sum(tensor.nbytes for tensor in small if tensor is not None)
        self.native = NativeCodes(
            codes=self._packed.address,
            scales=self._scales.data_ptr(),
            zeros=_address(self._zeros),
            bias=_address(self._bias),
            order=_address(self._order),
            outputs=self.out_features,
            inputs=self.in_features,
            multiplier=multiplier,
            bits=codes.bits,
            units_in_group=units_in_group,
            default_zero=codes.default_zero,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
        rows = rows.contiguous()
        units = torch.empty(rows.shape[0] * self.num_units * UNIT_BYTES, dtype=torch.uint8)
        out = torch.empty(rows.shape[0], self.out_features)
        source = (rows.data_ptr(), NATIVE_TYPES[rows.dtype], rows.stride(0))
        library().coded_linear(self.native, source, rows.shape[0], units.data_ptr(), (out.data_ptr(), out.stride(0)))
        return out.to(x.dtype)

    def record(self, x: Symbol) -> Symbol:
        return x.program.add("linear", self.out_features, (x,), parts={"kernel": self})


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _kernel_group(group_size: int) -> int:
    for size in reversed(_GROUPS):
        if group_size % size == 0:
            return size
    raise Unsupported(f"groups of {group_size} inputs (the CPU kernels know multiples of {_GROUPS[0]})")


def _blocked(of_groups: torch.Tensor) -> torch.Tensor:
    """[outputs, groups] → [block, group, 64]"""
    outputs, groups = of_groups.shape
    padded = torch.nn.functional.pad(of_groups, (0, 0, 0, -outputs % CODED_BLOCK))
    return padded.view(-1, CODED_BLOCK, groups).transpose(1, 2).contiguous()


def _pack(codes: Codes) -> NativeMemory:
    """As coded.hpp wants them: [block][group][sixteen][unit][step][16 outputs][4 inputs]."""
    outputs, depth = codes.num_outputs, -(-codes.num_inputs // codes.group_size) * codes.group_size
    row_bytes = depth * codes.bits // 8
    memory = NativeMemory(-(-outputs // CODED_BLOCK) * CODED_BLOCK * row_bytes)
    target = memory.array().view(-1, CODED_BLOCK * row_bytes)
    # a slice at a time: permuting takes several copies of it
    for first in range(0, outputs, _SLICE_OUTPUTS):
        part = codes.codes[first : first + _SLICE_OUTPUTS]
        padded = torch.nn.functional.pad(part, (0, depth - part.shape[1], 0, -part.shape[0] % CODED_BLOCK))
        packed = _arrange(padded, codes.bits, codes.group_size // UNIT)
        block = first // CODED_BLOCK
        target[block : block + packed.shape[0]] = packed
    return memory


def _arrange(codes: torch.Tensor, bits: int, units: int) -> torch.Tensor:
    """[outputs, depth] → [blocks, bytes of a block]"""
    blocks, groups = codes.shape[0] // CODED_BLOCK, codes.shape[1] // (units * UNIT)
    if bits == 8:
        steps = codes.view(blocks, 4, 16, groups, units, 8, 4).permute(0, 3, 1, 4, 5, 2, 6)
        return steps.reshape(blocks, -1)
    halves = codes.view(blocks, 4, 16, groups, units, 4, 2, 4).permute(6, 0, 3, 1, 4, 5, 2, 7)
    return (halves[0] | (halves[1] << 4)).reshape(blocks, -1)
