"""A model's step as a list of operations, recorded by calling the model once with symbols for tensors.

Layers that are called with a Symbol append an operation instead of computing. The CPU kernels run the whole
list in one native call. A layer that has no native operation raises NotNative, and the model then runs
operation by operation in torch. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class NotNative(Exception):
    """This model has a part that the native program can't express."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """A matrix with a row for each token of the step (or each selected row) and `width` columns."""

    program: Program
    slot: int
    width: int

    def __add__(self, other: Symbol) -> Symbol:
        return self.program.add("add", self.width, inputs=(self, other))

    def __mul__(self, factor: float) -> Symbol:
        return self.program.add("scale", self.width, inputs=(self,), numbers={"factor": float(factor)})


@dataclass(frozen=True, slots=True)
class Operation:
    """`kind` reads `inputs` and writes slot `output`. `parts` are weights and tables, kept alive here."""

    kind: str
    output: int
    inputs: tuple[int, ...]
    numbers: Mapping[str, float]
    parts: Mapping[str, Any]


@dataclass(slots=True, eq=False)
class Program:
    """Operations in order. Slots are numbered as they appear; `widths[slot]` is the slot's width."""

    operations: list[Operation] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def input(self, width: int) -> Symbol:
        return self._symbol(width)

    def add(
        self,
        kind: str,
        width: int,
        inputs: tuple[Symbol, ...] = (),
        numbers: Mapping[str, float] | None = None,
        parts: Mapping[str, Any] | None = None,
    ) -> Symbol:
        output = self._symbol(width)
        slots = tuple(symbol.slot for symbol in inputs)
        self.operations.append(Operation(kind, output.slot, slots, numbers or {}, parts or {}))
        return output

    def _symbol(self, width: int) -> Symbol:
        self.widths.append(width)
        return Symbol(self, len(self.widths) - 1, width)
