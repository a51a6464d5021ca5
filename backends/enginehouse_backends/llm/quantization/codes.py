"""A quantized weight before it is packed for a device: whole-number codes with a scale for each group.

Every integer format becomes this on its way in: GPTQ, AWQ, compressed-tensors, NF4 and our own rounding. Rows
are outputs and columns inputs, as in a plain weight, so joining parts and taking a rank's share are slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from enginehouse.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Codes:
    """value[n, k] = (codes[n, k] - zero) * scales[n, k // group_size], or table[codes[n, k]] * scale.

    With an `order`, column k of the codes is input order[k] of the linear.
    """

    codes: torch.Tensor
    """[outputs, inputs] uint8"""
    scales: torch.Tensor
    """[outputs, groups] float32"""
    zeros: torch.Tensor | None
    """[outputs, groups] uint8; None if `default_zero` is everyone's"""
    bits: int
    group_size: int
    default_zero: int = 0
    table: torch.Tensor | None = None
    """[2^bits] float32"""
    order: torch.Tensor | None = None
    """[inputs] int64"""

    @property
    def num_outputs(self) -> int:
        return self.codes.shape[0]

    @property
    def num_inputs(self) -> int:
        return self.codes.shape[1]

    def outputs(self, first: int, count: int) -> Codes:
        rows = slice(first, first + count)
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=zeros)

    def inputs(self, first: int, count: int, name: str) -> Codes:
        """Raises Unsupported if the cut goes through a group or the inputs are reordered."""
        if count == self.num_inputs:
            return self
        if self.order is not None:
            raise Unsupported(f"{name}: weights quantized with reordered inputs (desc_act) can't be divided")
        if first % self.group_size or count % self.group_size:
            raise Unsupported(
                f"{name}: {self.num_inputs} inputs in groups of {self.group_size} can't be divided at input {first}"
            )
        columns = slice(first, first + count)
        groups = slice(first // self.group_size, (first + count) // self.group_size)
        zeros = None if self.zeros is None else self.zeros[:, groups]
        return replace(self, codes=self.codes[:, columns], scales=self.scales[:, groups], zeros=zeros)

    def dequantize(self) -> torch.Tensor:
        """[outputs, inputs] float32, inputs in their own order."""
        spread = torch.arange(self.num_inputs, device=self.codes.device) // self.group_size
        if self.table is not None:
            values = self.table[self.codes.long()]
        else:
            zero = self.default_zero if self.zeros is None else self.zeros[:, spread].float()
            values = self.codes.float() - zero
        values = values * self.scales[:, spread]
        if self.order is None:
            return values
        back = torch.empty_like(values)
        back[:, self.order] = values
        return back


def join_outputs(parts: Sequence[Codes], name: str) -> Codes:
    """One weight from several with the same inputs. Raises Unsupported if they were quantized differently."""
    first = parts[0]
    for part in parts[1:]:
        same_order = (part.order is None) == (first.order is None) and (
            part.order is None or first.order is None or torch.equal(part.order, first.order)
        )
        if (part.bits, part.group_size) != (first.bits, first.group_size) or not same_order:
            raise Unsupported(
                f"{name}: the linears that are run as one were quantized differently ({first.bits} bits in groups "
                f"of {first.group_size}, {part.bits} bits in groups of {part.group_size})"
            )
    if len(parts) == 1:
        return first
    zeros = None
    if any(part.zeros is not None or part.default_zero != first.default_zero for part in parts):
        zeros = torch.cat([_explicit_zeros(part) for part in parts])
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    return replace(first, codes=codes, scales=scales, zeros=zeros)


def _explicit_zeros(part: Codes) -> torch.Tensor:
    if part.zeros is not None:
        return part.zeros
    return torch.full(part.scales.shape, part.default_zero, dtype=torch.uint8, device=part.codes.device)


def regroup(codes: Codes, group_size: int) -> Codes:
    """The same weight in smaller groups, for kernels that know only certain sizes."""
    if codes.group_size == group_size:
        return codes
    assert codes.group_size % group_size == 0, "bug: groups can only be divided"
    times = codes.group_size // group_size
    groups = -(-codes.num_inputs // group_size)
    zeros = None if codes.zeros is None else codes.zeros.repeat_interleave(times, 1)[:, :groups]
    scales = codes.scales.repeat_interleave(times, 1)[:, :groups]
    return replace(codes, scales=scales, zeros=zeros, group_size=group_size)
