"""Tensors that stay in a worker's memory between two models there: the server knows them by a number alone.

A tensor is held as long as anything in the server refers to it (a step's request, an ensemble's run); then the
worker is told. A message that names one goes out before the word to drop it, and the worker takes hold of what a
message names as it arrives, so nothing is dropped under a batch that waits. When the worker ends, all of it is gone.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from enginehouse.errors import EnginehouseError, FailureReason, Internal, Unavailable
from enginehouse.execution import messages as m
from enginehouse.execution.open_calls import NoAnswer
from enginehouse.execution.refs import datatype_of, tensor_of
from enginehouse.types import DeviceData, InferRequest, Tensor

if TYPE_CHECKING:
    from enginehouse.execution.joining import JoinedTensor
    from enginehouse.execution.process import WorkerProcess


class HeldTensors:
    """Those of one worker. On the loop, but for `drop`."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._dropped: deque[int] = deque()
        self._is_telling = False
        self.num_held = 0
        self.num_bytes_held = 0
        self.num_kept = 0
        """How many have been kept so far: copies that were spared."""
        self.num_fetched = 0
        """How many had to be copied to another process after all."""

    def take(self, piece: m.Piece, device: str) -> HeldData:
        """What the worker says it holds; the worker keeps it until the last view of that is gone."""
        number, _, nbytes = piece
        self.num_held += 1
        self.num_kept += 1
        self.num_bytes_held += nbytes
        return HeldData(_Hold(self, number, nbytes), 0, nbytes, device)

    def drop(self, number: int, nbytes: int) -> None:
        """From any thread: Python's collector runs where it likes."""
        self.num_held -= 1
        self.num_bytes_held -= nbytes
        self._dropped.append(number)
        if self._is_telling or self._loop.is_closed():
            return
        self._is_telling = True
        if threading.get_ident() == self._thread_id:
            self._loop.call_soon(self._tell)
        else:
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._is_telling = False
        numbers = []
        while self._dropped:
            numbers.append(self._dropped.popleft())
        self._worker.channel.send(m.Drop(numbers))

    def lacks(self, tensor: JoinedTensor) -> bool:
        """Whether another worker holds some of it."""
        return any(isinstance(part, HeldData) and part.owner is not self for part in tensor.parts)

    async def brought_here(self, tensor: JoinedTensor) -> JoinedTensor:
        """The tensor with copies of the parts that other workers hold. Raises Unavailable if one has ended."""
        if not self.lacks(tensor):
            return tensor
        parts = [
            await part.owner.fetch(part) if isinstance(part, HeldData) and part.owner is not self else part
            for part in tensor.parts
        ]
        in_host = sum(part.nbytes for part in parts if isinstance(part, memoryview))
        return replace(tensor, parts=parts, nbytes=in_host, is_held=any(isinstance(part, HeldData) for part in parts))

    async def fetch(self, data: HeldData) -> memoryview:
        """A copy in the server's memory. Raises Unavailable if the worker has ended."""
        self.num_fetched += 1
        try:
            block = await self._worker.call(lambda call_id: m.Fetch(call_id, data.piece))
            if not self._worker.alive:  # it answered and ended before we came to read
                raise NoAnswer(f"{self._worker.what} has ended")
            return self._worker.incoming.open(block, data.nbytes)
        except EnginehouseError as problem:
            raise Unavailable(
                f"a tensor of an earlier step can't be had: {problem.message}", reason=FailureReason.BACKEND
            ) from problem


class _Hold:
    """One tensor of a worker; tells it when nobody needs it any more."""

    __slots__ = ("nbytes", "number", "tensors")

    def __init__(self, tensors: HeldTensors, number: int, nbytes: int) -> None:
        self.tensors = tensors
        self.number = number
        self.nbytes = nbytes

    def __del__(self) -> None:
        self.tensors.drop(self.number, self.nbytes)


class HeldData(DeviceData):
    """A range of a held tensor, as a tensor's data. Its bytes are read with `HeldTensors.fetch` alone."""

    def __init__(self, hold: _Hold, offset: int, nbytes: int, device: str) -> None:
        self._hold = hold
        self.offset = offset
        self.nbytes = nbytes
        self.device = device

    @property
    def owner(self) -> HeldTensors:
        return self._hold.tensors

    @property
    def piece(self) -> m.Piece:
        return (self._hold.number, self.offset, self.nbytes)

    def part(self, offset: int, nbytes: int) -> HeldData:
        return HeldData(self._hold, self.offset + offset, nbytes, self.device)

    def to_host(self) -> memoryview:
        raise Internal(f"a tensor that stayed on {self.device} was read in the server: a bug of whoever kept it there")


def kept_outputs(requests: Sequence[InferRequest]) -> list[str]:
    """What all requests of a batch leave in the worker."""
    if not requests[0].kept_outputs:
        return []
    return list(frozenset.intersection(*(request.kept_outputs for request in requests)))


def output_of(ref: m.TensorRef, memory: memoryview, held: Mapping[str, HeldData]) -> Tensor:
    data = held.get(ref.name)
    return tensor_of(ref, memory) if data is None else Tensor(ref.name, datatype_of(ref), ref.shape, data)


def pieces_of(parts: Sequence[memoryview | HeldData], offset: int) -> tuple[m.Piece, ...]:
    """Where the bytes of an input are, in order: in the batch's block from `offset` on, or in held tensors. Ranges
    that follow one another are one."""
    pieces: list[m.Piece] = []
    for part in parts:
        if isinstance(part, HeldData):
            piece = part.piece
        else:
            piece = (m.IN_BLOCK, offset, part.nbytes)
            offset += part.nbytes
        last = pieces[-1] if pieces else None
        if last is not None and last[0] == piece[0] and last[1] + last[2] == piece[1]:
            pieces[-1] = (last[0], last[1], last[2] + piece[2])
        else:
            pieces.append(piece)
    return tuple(pieces)
