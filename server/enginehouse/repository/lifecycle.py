"""Brings versions up and down: explicit loads, unloads, start-up and changes in the repository.

A new version is built while the old one serves and replaces it only when all of the load has succeeded; a
failed load leaves what served in place. What is decided (which versions, in place or anew) is decided by
`plan_load`; the rest carries it out. Texts are Triton's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError, Internal, InvalidArgument
from enginehouse.execution.ledger import InsufficientMemory
from enginehouse.execution.residency import Resident, choose_victims, outstayed
from enginehouse.repository.agents import Event
from enginehouse.repository.contract import ModelSource, VersionBuilder
from enginehouse.repository.definition import ModelDefinition, NotUnique, Override, PollError
from enginehouse.repository.load_plan import Loaded, plan_load
from enginehouse.repository.registry import UNLOADED, Registry, ServedVersion, VersionState
from enginehouse.repository.residents import residents
from enginehouse.repository.retiring import Retiring, tell_agents

logger = logging.getLogger("enginehouse.repository")

MAX_EVICTION_ROUNDS = 100
"""Others may book what was just freed; after so many lost races the refusal stands."""


class Lifecycle:
    """One per server. Loads of one model happen one after the other; different models in parallel."""

    def __init__(
        self,
        registry: Registry,
        source: ModelSource,
        builder: VersionBuilder,
        *,
        num_parallel_loads: int = 4,
        num_retries: int = 0,
        on_change: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.registry = registry
        self._source = source
        self._builder = builder
        self._num_retries = num_retries
        self._on_change = on_change
        self._slots = asyncio.Semaphore(max(num_parallel_loads, 1))
        self._locks: dict[str, asyncio.Lock] = {}
        self._loaded: dict[str, Loaded] = {}
        self._failed: dict[str, ModelDefinition] = {}
        self._poll_failures: dict[str, str] = {}
        """Why models can't be read now."""
        self._suspended: dict[str, bool] = {}
        """Ensembles that went with a member and come back with it; whether they were loaded by name."""
        self._retiring = Retiring(registry, builder, on_change)

    # --- what the outside asks for

    async def load(self, name: str, override: Override | None = None) -> None:
        """Raises Internal if the model can't be read, InvalidArgument if it can't be loaded."""
        try:
            definition = await asyncio.to_thread(self._source.poll, name, override)
        except PollError as problem:
            self._note_poll_failure(name, problem)
            raise Internal(f"failed to load '{name}', failed to poll from model repository") from problem
        await self._load_definition(definition, explicit=True, above=())

    async def unload(self, name: str, unload_dependents: bool = False) -> None:
        """Returns when nothing new is accepted; what is in flight finishes in the background."""
        loaded = self._loaded.get(name)
        members = member_names(loaded.definition.config) if loaded and unload_dependents else []
        async with self._lock(name):
            self._take_down(name)
        self._suspended.pop(name, None)
        for other in self._dependents_of(name):
            explicit = self._loaded[other].explicit
            async with self._lock(other):
                self._take_down(other)
            self._suspended[other] = explicit
        for member in members:
            entry = self._loaded.get(member)
            if entry is not None and not entry.explicit and not self._dependents_of(member):
                await self.unload(member, unload_dependents=True)

    async def load_all(self, names: Sequence[str]) -> dict[str, str]:
        """Loads these; gives back why each failed one failed."""
        problems: dict[str, str] = {}

        async def one(name: str) -> None:
            try:
                await self.load(name)
            except EnginehouseError as error:
                problems[name] = error.message.rstrip()

        await asyncio.gather(*(one(name) for name in names))
        return problems

    async def refresh(self) -> None:
        """Brings what serves in line with what the repositories hold (control mode poll)."""
        names = await asyncio.to_thread(self._source.names)
        for name in sorted(set(self._loaded) - set(names)):
            await self.unload(name)
        for name in names:
            await self._refresh_one(name)

    async def close(self) -> None:
        """Takes everything down and waits for it."""
        for name in list(self.registry.models):
            self._take_down(name)
        await self.wait_retired()

    async def wait_retired(self) -> None:
        await self._retiring.gone()

    @property
    def num_live(self) -> int:
        """Versions that serve or are being taken down."""
        return self._retiring.num_tasks + sum(1 for _ in self.registry.all_ready())

    async def unload_idle(self) -> Sequence[str]:
        """Unloads models whose idle time is over; their next request loads them again. Their names."""
        gone: list[str] = []
        while names := outstayed(self._residents()):  # anew each time: going may take long
            await self._evict(names[0], "idle")
            gone.append(names[0])
        return gone

    def list_on_demand(self, name: str) -> None:
        self.registry.record(name).on_demand = True

    # --- loading

    async def _refresh_one(self, name: str) -> None:
        try:
            definition = await asyncio.to_thread(self._source.poll, name, None)
        except PollError as problem:
            if self._poll_failures.get(name) != str(problem):  # said once, not at every look
                self._note_poll_failure(name, problem)
            if isinstance(problem, NotUnique) and name in self._loaded:
                await self.unload(name)
            return
        failed = self._failed.get(name)
        if failed is not None and failed.same_as(definition):
            return  # it would only fail again: wait for the next change
        try:
            await self._load_definition(definition, explicit=True, above=())
        except EnginehouseError as error:
            logger.error("%s", error.message.rstrip())

    def poll_failure(self, name: str) -> str:
        """Why the model's folder could not be read when it was last looked at; "" if it could."""
        return self._poll_failures.get(name, "")

    def _note_poll_failure(self, name: str, problem: PollError) -> None:
        """What serves goes on serving; the log and the index say why it stays as it is."""
        logger.error("Poll failed for model '%s': %s", name, problem)
        self._poll_failures[name] = str(problem)
        for served in self.registry.ready_versions(name):
            self.registry.set_state(name, served.version, VersionState.READY, f"failed to poll: {problem}", served)

    async def _load_definition(
        self, definition: ModelDefinition, explicit: bool, above: tuple[str, ...]
    ) -> None:
        name = definition.name
        try:
            await self._load_members(definition, (*above, name))
            async with self._lock(name):
                await self._carry_out(definition, explicit)
        except EnginehouseError as error:
            self._failed[name] = definition
            self._on_change(name)
            await tell_agents(definition, Event.LOAD_FAILED)
            raise InvalidArgument(f"load failed for model '{name}': {error.message}\n") from error
        self._source.loaded(definition)
        self._failed.pop(name, None)
        self._suspended.pop(name, None)
        self._on_change(name)
        await self._bring_back(name)

    async def _bring_back(self, member: str) -> None:
        """Loads the ensembles again that went down with this member."""
        for name, explicit in list(self._suspended.items()):
            try:
                definition = await asyncio.to_thread(self._source.poll, name, None)
                if member in member_names(definition.config):
                    await self._load_definition(definition, explicit, above=())
            except (PollError, EnginehouseError) as problem:
                logger.warning("ensemble '%s' does not come back with '%s': %s", name, member, str(problem).rstrip())

    async def _load_members(self, definition: ModelDefinition, path: tuple[str, ...]) -> None:
        """An ensemble's members are loaded before it, and its graph is checked against them."""
        if not definition.config.HasField("ensemble_scheduling"):
            return
        name = definition.name
        for member in member_names(definition.config):
            if member in path:
                raise InvalidArgument(
                    f"circular dependency between ensembles: {name} -> ... -> {member} -> {path[-1]}"
                )
            if self.registry.ready_versions(member):
                continue
            try:
                found = await asyncio.to_thread(self._source.poll, member, None)
            except PollError as problem:
                raise InvalidArgument(
                    f"ensemble {name} contains models that are not available or ambiguous: {member}"
                ) from problem
            try:
                await self._load_definition(found, explicit=False, above=path)
            except EnginehouseError as error:
                reason = error.message.removeprefix(f"load failed for model '{member}': ").rstrip("\n")
                raise InvalidArgument(
                    f"ensemble '{name}' depends on '{member}' which has no loaded version. Model '{member}' "
                    f"loading failed with error: {reason}"
                ) from error
        self._builder.check_ensemble(definition.config)

    async def _carry_out(self, definition: ModelDefinition, explicit: bool) -> None:
        name = definition.name
        record = self.registry.record(name)
        if not definition.versions:
            raise InvalidArgument(
                f"at least one version must be available under the version policy of model '{name}'"
            )
        if not self.registry.ready_versions(name):  # not beside its own remains: they may hold its device or file
            await self._retiring.gone(name)
        ready = {served.version: served for served in self.registry.ready_versions(name)}
        current = self._loaded.get(name)
        plan = plan_load(definition, current, ready)
        started_s = time.monotonic()
        if plan.resize:
            for served in ready.values():
                await self._builder.set_instances(served, definition.config)
        elif plan.build:
            await self._replace(definition, plan.build, ready)
            await tell_agents(definition, Event.LOADED)
        for version in plan.retire:
            self._retire_version(name, ready[version])
        for version in set(ready).difference(plan.build, plan.retire):
            self.registry.set_state(name, version, VersionState.READY, served=ready[version])  # no complaint any more
        self._poll_failures.pop(name, None)
        self._loaded[name] = Loaded(
            definition,
            dict(definition.fingerprints),
            explicit or (current is not None and current.explicit),
            time.monotonic() - started_s if plan.build or current is None else current.load_s,
        )
        record.on_demand = definition.on_demand

    async def _replace(
        self, definition: ModelDefinition, versions: Sequence[int], ready: Mapping[int, ServedVersion]
    ) -> None:
        """Builds all of `versions`; puts them in place together, or not at all."""
        name = definition.name
        replaced = {served.version: served for served in self.registry.given_up(name)} | dict(ready)
        for version in versions:
            if version not in ready:
                self.registry.set_state(name, version, VersionState.LOADING)
        self._on_change(name)
        results = await asyncio.gather(
            *(self._build(definition, version) for version in versions), return_exceptions=True
        )
        built = [result for result in results if isinstance(result, ServedVersion)]
        problems = {
            version: result
            for version, result in zip(versions, results, strict=True)
            if isinstance(result, BaseException)
        }
        if problems:
            await asyncio.gather(*(self._builder.retire(served) for served in built))
            self._note_failures(name, versions, problems, ready)
        for served in built:
            served.last_used_ns = time.monotonic_ns()
            self.registry.set_state(name, served.version, VersionState.READY, served=served)
            logger.info("successfully loaded '%s' version %s", name, served.version)
        for served in built:
            if served.version in replaced:
                self._retiring.retire(name, replaced[served.version])

    def _note_failures(
        self,
        name: str,
        versions: Sequence[int],
        problems: Mapping[int, BaseException],
        ready: Mapping[int, ServedVersion],
    ) -> None:
        texts = []
        for version in versions:
            problem = problems.get(version)
            reason = UNLOADED if problem is None else describe(problem)
            if version in ready:
                # The old one goes on serving; the index says why the new one doesn't.
                self.registry.set_state(name, version, VersionState.READY, reason, ready[version])
            else:
                self.registry.set_state(name, version, VersionState.UNAVAILABLE, reason)
            if problem is not None:
                logger.error("failed to load '%s' version %s: %s", name, version, reason)
                texts.append(f"version {version} is at UNAVAILABLE state: {reason};")
        self._on_change(name)
        raise InvalidArgument("".join(texts))

    async def _build(self, definition: ModelDefinition, version: int) -> ServedVersion:
        async with self._slots:
            started_s = time.monotonic()
            for attempt in range(self._num_retries + 1):
                try:
                    logger.info("loading: %s:%s", definition.name, version)
                    served = await self._build_with_room(definition, version)
                    served.load_s = time.monotonic() - started_s
                    return served
                except EnginehouseError as error:
                    if attempt == self._num_retries:
                        raise
                    logger.warning("load of '%s' failed, trying again: %s", definition.name, error)
            raise AssertionError("the last attempt returns or raises: a bug")

    async def _build_with_room(self, definition: ModelDefinition, version: int) -> ServedVersion:
        """Where memory is short, others are unloaded as far as their residency allows."""
        for _ in range(MAX_EVICTION_ROUNDS):
            try:
                return await self._builder.build(definition, version)
            except InsufficientMemory as shortage:
                others = [one for one in self._residents() if one.name != definition.name]
                victims = choose_victims(others, shortage.missing)
                if not victims and not self._retiring.any_but(definition.name):
                    raise
                for name in victims:
                    await self._evict(name, f"evicted for '{definition.name}'")
                await self._retiring.any_gone_but(definition.name)
        return await self._builder.build(definition, version)

    async def _evict(self, name: str, why: str) -> None:
        """Takes the model down and leaves it to its next request. Waits until its memory is back."""
        if not any(name == resident.name for resident in self._residents()):
            return  # gone by itself, or about to be another, while others went
        for served in self.registry.ready_versions(name):
            logger.info("unloading %s:%s (%s)", name, served.version, why)
            self._retiring.retire(name, served, UNLOADED)
        self.registry.record(name).on_demand = True
        del self._loaded[name]
        await self._retiring.gone(name)

    def _residents(self) -> list[Resident]:
        """Without those that are being loaded anew: their memory is spoken for."""
        resting = {name: one for name, one in self._loaded.items() if not self._lock(name).locked()}
        return residents(resting, self.registry, self._builder.bytes_of, time.monotonic_ns())

    # --- unloading

    def _take_down(self, name: str) -> None:
        loaded = self._loaded.pop(name, None)
        self._failed.pop(name, None)
        self._poll_failures.pop(name, None)
        self._source.forget_override(name)
        for served in (*self.registry.ready_versions(name), *self.registry.given_up(name)):
            self._retire_version(name, served)
        if loaded is not None and loaded.definition.agents is not None:
            self._retiring.tell_agents(loaded.definition)
        self._on_change(name)

    def _retire_version(self, name: str, served: ServedVersion) -> None:
        logger.info("unloading: %s:%s", name, served.version)
        self._retiring.retire(name, served, UNLOADED)

    def _dependents_of(self, name: str) -> list[str]:
        return [
            other
            for other, loaded in self._loaded.items()
            if other != name and name in member_names(loaded.definition.config)
        ]

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def member_names(config: ModelConfig) -> list[str]:
    """The models of an ensemble's steps, each once, in order."""
    return list(dict.fromkeys(step.model_name for step in config.ensemble_scheduling.step))


def describe(problem: BaseException) -> str:
    """A reason as the index shows it: "<code>: <text>"."""
    if isinstance(problem, EnginehouseError):
        return f"{problem.code.value}: {problem.message}"
    return f"Internal: {type(problem).__name__}: {problem}"
