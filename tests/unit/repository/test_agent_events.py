"""Repository agents are told what becomes of their model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.repository.agents import AgentChain, AgentModel, Event, RepositoryAgent
from enginehouse.repository.lifecycle import Lifecycle
from enginehouse.repository.registry import Registry

from .factories import Builder, Source, definition


class Listening(RepositoryAgent):
    def __init__(self, name: str, told: list[tuple[str, Event]]) -> None:
        self._name = name
        self._told = told

    def prepare(self, model: AgentModel) -> Path | None:
        return None

    def notice(self, model: AgentModel, event: Event) -> None:
        self._told.append((self._name, event))


def rig(told: list[tuple[str, Event]]) -> tuple[Lifecycle, Builder]:
    chain = AgentChain(Path())
    for name in ("first", "second"):
        chain.add(Listening(name, told), AgentModel("m", ModelConfig(), Path(), {}))
    registry = Registry()
    builder = Builder(registry)
    source = Source({"m": replace(definition(), agents=chain)})
    return Lifecycle(registry, source, builder), builder


@pytest.mark.asyncio
async def test_agents_hear_of_loading_and_unloading_in_order() -> None:
    told: list[tuple[str, Event]] = []
    lifecycle, _ = rig(told)
    await lifecycle.load("m")
    await lifecycle.load("m")  # nothing changed, nothing to tell
    assert told == [("first", Event.LOADED), ("second", Event.LOADED)]
    told.clear()
    await lifecycle.unload("m")
    await lifecycle.wait_retired()
    assert told == [
        ("second", Event.UNLOADING),
        ("first", Event.UNLOADING),
        ("second", Event.UNLOADED),
        ("first", Event.UNLOADED),
    ]


@pytest.mark.asyncio
async def test_agents_hear_of_a_failed_load() -> None:
    told: list[tuple[str, Event]] = []
    lifecycle, builder = rig(told)
    builder.broken.add(("m", 1))
    with pytest.raises(InvalidArgument):
        await lifecycle.load("m")
    assert told == [("second", Event.LOAD_FAILED), ("first", Event.LOAD_FAILED)]
