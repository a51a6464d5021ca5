"""Versions that go: what is in flight finishes in the background, and then their states say that they are gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from enginehouse.repository.agents import Event
from enginehouse.repository.contract import VersionBuilder
from enginehouse.repository.definition import ModelDefinition
from enginehouse.repository.registry import Registry, ServedVersion, VersionState

logger = logging.getLogger("enginehouse.repository")


class Retiring:
    """Of one lifecycle."""

    def __init__(self, registry: Registry, builder: VersionBuilder, on_change: Callable[[str], None]) -> None:
        self._registry = registry
        self._builder = builder
        self._on_change = on_change
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}

    @property
    def num_tasks(self) -> int:
        return sum(len(tasks) for tasks in self._tasks.values())

    def any_but(self, name: str) -> bool:
        return any(tasks for other, tasks in self._tasks.items() if other != name)

    def retire(self, name: str, served: ServedVersion, reason: str = "") -> None:
        """With a reason the version itself goes; without, only its former build does."""
        if reason:
            self._registry.set_state(name, served.version, VersionState.UNLOADING, served=served)
        self._start(name, self._retire(name, served, reason), f"retire {name}:{served.version}")

    def tell_agents(self, definition: ModelDefinition) -> None:
        """That the model is being unloaded, and that it has been, once all that goes of it now has gone."""
        going = set(self._tasks.get(definition.name, ()))

        async def tell() -> None:
            await tell_agents(definition, Event.UNLOADING)
            if going:
                await asyncio.wait(going)
            await tell_agents(definition, Event.UNLOADED)

        self._start(definition.name, tell(), f"tell agents of {definition.name}")

    async def gone(self, name: str = "") -> None:
        """Waits until all of the model has gone, or everything."""
        tasks = {task for other, tasks in self._tasks.items() if name in ("", other) for task in tasks}
        if tasks:
            await asyncio.wait(tasks)

    async def any_gone_but(self, name: str) -> None:
        """Waits until something of another model has."""
        tasks = {task for other, tasks in self._tasks.items() if other != name for task in tasks}
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    def _start(self, name: str, work: Coroutine[Any, Any, None], title: str) -> None:
        task = asyncio.create_task(work, name=title)
        tasks = self._tasks.setdefault(name, set())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _retire(self, name: str, served: ServedVersion, reason: str) -> None:
        remains = await self._builder.retire(served)
        entry = self._registry.record(name).versions[served.version]
        if not reason or entry.served is not served:
            return
        if remains is not None:
            said = f"{reason}; {remains.text}"
            self._registry.set_state(name, served.version, VersionState.UNAVAILABLE, said)
            remains.gone.add_done_callback(lambda _: self._note_gone(name, served.version, said, reason))
        else:
            self._registry.set_state(name, served.version, VersionState.UNAVAILABLE, reason)
            logger.info("successfully unloaded '%s' version %s", name, served.version)
        self._on_change(name)

    def _note_gone(self, name: str, version: int, said: str, reason: str) -> None:
        """The calls that kept an unloaded version have returned."""
        if self._registry.record(name).versions[version].reason == said:
            self._registry.set_state(name, version, VersionState.UNAVAILABLE, reason)
            logger.info("what was left of '%s' version %s has gone", name, version)
            self._on_change(name)


async def tell_agents(definition: ModelDefinition, event: Event) -> None:
    if definition.agents is not None:
        await asyncio.to_thread(definition.agents.notice, event)
