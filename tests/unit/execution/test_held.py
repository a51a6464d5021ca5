"""Tensors in a worker's memory, as the server reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from enginehouse.errors import Unavailable
from enginehouse.execution.held import HeldTensors
from enginehouse.execution.process import WorkerProcess
from enginehouse.execution.slab import ReaderSlab


class AnswersAndEnds:
    """A worker whose last words and whose end are noticed together."""

    def __init__(self) -> None:
        self.alive, self.what = True, "model 'm'"
        self.incoming = ReaderSlab()
        self.channel = self

    def send(self, message: object) -> None:
        """To one that has ended: nothing."""

    async def call(self, make: Callable[[int], Any]) -> int:
        self.alive = False
        return 0


@pytest.mark.asyncio
async def test_a_tensor_whose_worker_ends_right_after_its_answer_is_unavailable() -> None:
    held = HeldTensors(cast(WorkerProcess, AnswersAndEnds()))
    data = held.take((1, 0, 64), "cpu")
    with pytest.raises(Unavailable, match="a tensor of an earlier step can't be had"):
        await held.fetch(data)
