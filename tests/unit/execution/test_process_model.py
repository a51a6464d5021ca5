"""A version in processes: what its owner may rely on. The processes here are fakes that end when told to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from enginehouse.backend import LoadContext, Placement
from enginehouse.config.schema import ModelConfig
from enginehouse.execution.hosting_plan import ProcessKey
from enginehouse.execution.messages import ModelSource
from enginehouse.execution.process_host import HostProcess
from enginehouse.execution.process_model import ProcessHostedModel
from enginehouse.execution.supervision import SupervisionPolicy


class EndsWhenTold:
    """What a model needs of a HostProcess to come and go."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.num_detached = 0

    async def attach(self, tenant: object) -> None:
        pass

    async def detach(self, tenant: object) -> None:
        await self.may_end.wait()
        self.num_detached += 1


def model_in(process: EndsWhenTold) -> ProcessHostedModel:
    context = LoadContext(ModelConfig(name="m"), 1, Path("/nowhere"))
    return ProcessHostedModel(
        context,
        ModelSource("python", "", b"", 1, "/nowhere", {}),
        SupervisionPolicy(),
        lambda placement: ProcessKey("m"),
        lambda key: cast(HostProcess, process),
        lambda health: None,
    )


@pytest.mark.asyncio
async def test_two_who_close_at_once_wait_for_the_same_end_and_tell_it_once() -> None:
    process = EndsWhenTold()
    ends: list[int] = []
    model = model_in(process)
    model.on_closed = lambda: ends.append(process.num_detached)
    await model.start([Placement("m_0_0")])

    closing = [asyncio.ensure_future(model.close()) for _ in range(2)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(task.done() for task in closing)
    assert ends == []
    process.may_end.set()
    await asyncio.gather(*closing)

    assert ends == [1]
