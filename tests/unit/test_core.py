"""Models that their first request loads: whoever waits is answered, and nobody's leaving stops the load."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from enginehouse.core import Core
from enginehouse.errors import Internal, NotFound
from enginehouse.observe.logs import LogSettings
from enginehouse.options import ServerOptions
from enginehouse.repository.lifecycle import Lifecycle
from enginehouse.repository.registry import Registry
from enginehouse.types import InferRequest, InferResponse


class Loads:
    """A lifecycle whose loads end when they are let, with what they are given."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.may_end = asyncio.Event()
        self.problem = problem
        self.num_begun = self.num_ended = 0

    async def load(self, name: str) -> None:
        self.num_begun += 1
        await self.may_end.wait()
        self.num_ended += 1
        if self.problem is not None:
            raise self.problem


def core_with(loads: Loads) -> Core:
    core = Core(Registry(), options=ServerOptions(), tracing=None, logs=LogSettings(), metrics=None)
    core.lifecycle = cast(Lifecycle, loads)
    core.registry.record("m").on_demand = True
    return core


@pytest.mark.asyncio
async def test_a_load_on_demand_that_breaks_answers_everybody_and_may_be_tried_again() -> None:
    loads = Loads(RuntimeError("a bug"))
    loads.may_end.set()
    core = core_with(loads)
    for round_ in (1, 2):
        answers: asyncio.Queue[InferResponse] = asyncio.Queue()
        for _ in range(2):
            core.submit(InferRequest("m", sink=answers.put_nowait))
        async with asyncio.timeout(5):
            errors = [(await answers.get()).error for _ in range(2)]
        assert {type(error) for error in errors} == {Internal}
        assert loads.num_begun == round_


@pytest.mark.asyncio
async def test_a_client_that_leaves_does_not_stop_a_load_on_demand() -> None:
    loads = Loads()
    core = core_with(loads)
    client = asyncio.create_task(core.loaded_model("m"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    client.cancel()
    await asyncio.wait([client])
    loads.may_end.set()
    with pytest.raises(NotFound):
        await core.loaded_model("m")  # it loads nothing
    assert (loads.num_begun, loads.num_ended) == (2, 2)
