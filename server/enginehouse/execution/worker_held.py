"""What a worker keeps between two models of its own: outputs of one that are the inputs of another."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from enginehouse.errors import Internal
from enginehouse.execution.messages import IN_BLOCK, Execute, Piece, TensorRef
from enginehouse.execution.refs import datatype_of, tensor_of
from enginehouse.types import DeviceData, Tensor

Data: TypeAlias = memoryview | DeviceData
Pins: TypeAlias = Mapping[int, Data]


class HeldInWorker:
    """By number, from `hold` to `drop`. Any thread."""

    def __init__(self) -> None:
        self._numbers = itertools.count(IN_BLOCK + 1)
        self._data: dict[int, Data] = {}

    def hold(self, data: Data) -> Piece:
        number = next(self._numbers)
        self._data[number] = data.toreadonly() if isinstance(data, memoryview) else data
        return (number, 0, data.nbytes)

    def drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._data.pop(number, None)

    def pin(self, message: Execute) -> Pins:
        """What the batch reads, held for it from now on."""
        numbers = {piece[0] for ref in message.joined for piece in ref.pieces if piece[0] != IN_BLOCK}
        return {number: self._data[number] for number in numbers if number in self._data}

    def bytes_of(self, piece: Piece) -> memoryview:
        """In host memory. Raises Internal for a number that isn't held."""
        data = _part(piece, memoryview(b""), self._data)
        return data if isinstance(data, memoryview) else data.to_host()


def input_of(ref: TensorRef, memory: memoryview, pins: Pins) -> Tensor:
    """An input of a batch: a view wherever its bytes are in one place, else a copy in host memory."""
    if not ref.pieces:
        return tensor_of(ref, memory)
    parts = [_part(piece, memory, pins) for piece in ref.pieces]
    data = parts[0] if len(parts) == 1 else _gathered(parts)
    return Tensor(ref.name, datatype_of(ref), ref.shape, data)


def _part(piece: Piece, memory: memoryview, pins: Pins) -> Data:
    number, offset, nbytes = piece
    whole = memory if number == IN_BLOCK else pins.get(number)
    if whole is None or not 0 <= offset <= offset + nbytes <= whole.nbytes:
        raise Internal(f"bytes {offset}+{nbytes} of tensor {number} are not held: a bug of the server")
    return whole[offset : offset + nbytes] if isinstance(whole, memoryview) else whole.part(offset, nbytes)


def _gathered(parts: Sequence[Data]) -> Data:
    first = parts[0]
    joined = first.joined(parts) if isinstance(first, DeviceData) else None
    if joined is not None:
        return joined
    target = np.empty(sum(part.nbytes for part in parts), np.uint8).data
    offset = 0
    for part in parts:
        target[offset : offset + part.nbytes] = part if isinstance(part, memoryview) else part.to_host()
        offset += part.nbytes
    return target
