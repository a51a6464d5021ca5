"""A version whose instances live in processes: what the server sees of it, whatever happens to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from enginehouse.backend import LoadContext, Placement
from enginehouse.execution import messages as m
from enginehouse.execution.contract import HostHealth, HostState
from enginehouse.execution.growth import BookGrowth, not_booked
from enginehouse.execution.hosting_plan import ProcessKey
from enginehouse.execution.joiners import joiner_of
from enginehouse.execution.patience import Progress
from enginehouse.execution.process_host import STUCK_WHILE_LEAVING, HostProcess, Tenant
from enginehouse.execution.process_instances import ProcessGenerative, ProcessInstance
from enginehouse.execution.supervision import CrashHistory, SupervisionPolicy

KeyOf = Callable[[Placement], ProcessKey]
MakeProcess = Callable[[ProcessKey], HostProcess]
"""The process for that key: new, or one that others use too."""


class ProcessHostedModel:
    """contract.HostedModel. `key_of` says which instances share a process."""

    def __init__(
        self,
        context: LoadContext,
        source: m.ModelSource,
        policy: SupervisionPolicy,
        key_of: KeyOf,
        make_process: MakeProcess,
        on_health: Callable[[HostHealth], None],
    ) -> None:
        self.config = context.config
        self.name = context.name
        self.version = context.version
        self.version_text = str(context.version)
        self.source = source
        self.policy = policy
        self.joiner = joiner_of(context.config)
        self.generative: ProcessGenerative | None = None
        self.tenants: dict[ProcessKey, tuple[HostProcess, Tenant]] = {}
        self.on_closed: Callable[[], None] = lambda: None
        self.book_growth: BookGrowth = not_booked
        """Of its own slabs."""
        self.health = HostHealth(HostState.READY)
        self.progress = Progress()
        self._key_of = key_of
        self._make_process = make_process
        self._on_health = on_health
        self._history = CrashHistory(policy)
        self._order: dict[str, int] = {}
        self._is_started = False
        self._closing: asyncio.Task[None] | None = None

    @property
    def all_instances(self) -> list[ProcessInstance]:
        instances = [instance for _, tenant in self.tenants.values() for instance in tenant.instances]
        return sorted(instances, key=lambda instance: self._order.get(instance.name, 0))

    @property
    def instances(self) -> Sequence[ProcessInstance]:
        return [instance for instance in self.all_instances if not instance.placement.passive]

    @property
    def shared_processes(self) -> frozenset[ProcessKey]:
        if any(instance.kind != "tensors" for _, tenant in self.tenants.values() for instance in tenant.instances):
            return frozenset()
        return frozenset(key for key in self.tenants if key.shared)

    def generative_of(self, instance: ProcessInstance) -> ProcessGenerative:
        return self.generative or ProcessGenerative(instance)

    # --- loading

    async def start(self, placements: Sequence[Placement]) -> None:
        """Raises what loading raises, with nothing left running."""
        try:
            await self._add(placements)
        except BaseException:
            await self._detach_all()
            raise
        self._note_order(placements)
        self._is_started = True

    async def _add(self, placements: Sequence[Placement]) -> None:
        """Waits for all of them, then raises the first problem."""
        shares: dict[ProcessKey, list[Placement]] = {}
        for placement in placements:
            shares.setdefault(self._key_of(placement), []).append(placement)
        started = await asyncio.gather(
            *(self._add_share(key, share) for key, share in shares.items()), return_exceptions=True
        )
        for problem in started:
            if problem is not None:
                raise problem

    async def _add_share(self, key: ProcessKey, placements: Sequence[Placement]) -> None:
        instances = [ProcessInstance(self, placement) for placement in placements]
        if key in self.tenants:
            process, tenant = self.tenants[key]
            await process.add_instances(tenant, instances)
            return
        process, tenant = self._make_process(key), Tenant(self, instances)
        await process.attach(tenant)
        self.tenants[key] = (process, tenant)

    async def set_instances(self, placements: Sequence[Placement]) -> None:
        """Raises what creating one raises; nothing has changed then."""
        before = self.all_instances
        wanted = {placement.name: placement for placement in placements}
        kept = [instance for instance in before if wanted.get(instance.name) == instance.placement]
        names_kept = {instance.name for instance in kept}
        try:
            await self._add([placement for placement in placements if placement.name not in names_kept])
        except BaseException:
            for instance in self.all_instances:
                if instance not in before:
                    await self._remove(instance)
            raise
        gone = [instance for instance in before if instance not in kept]
        self._note_order(placements)
        for instance in gone:
            await self._remove(instance)

    def _note_order(self, placements: Sequence[Placement]) -> None:
        self._order = {placement.name: place for place, placement in enumerate(placements)}

    async def _remove(self, instance: ProcessInstance) -> None:
        key = self._key_of(instance.placement)
        process, tenant = self.tenants[key]
        if tenant.instances == [instance]:
            del self.tenants[key]
            if await instance.retire():
                await process.detach(tenant)
            else:
                await process.evict(tenant, STUCK_WHILE_LEAVING)
        else:
            await process.remove_instance(tenant, instance)

    async def close(self) -> None:
        """Once: at the end of the server an unload that still waits and `Hosts.close` both come here."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def end(self, why: str) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._end(why))
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._detach_all()
        self._say_closed("was unloaded")

    async def _end(self, why: str) -> None:
        tenants, self.tenants = self.tenants, {}
        await asyncio.gather(*(process.evict(tenant, why) for process, tenant in tenants.values()))
        self._say_closed(why)

    def _say_closed(self, why: str) -> None:
        if self.generative is not None:
            self.generative.fail_all(f"model '{self.name}' {why}")
        self.on_closed()

    async def _detach_all(self) -> None:
        tenants, self.tenants = self.tenants, {}
        await asyncio.gather(*(process.detach(tenant) for process, tenant in tenants.values()))

    def pids(self) -> dict[str, list[int]]:
        """Processes that are this model's alone, by device."""
        found: dict[str, list[int]] = {}
        for key, (process, tenant) in self.tenants.items():
            if not key.shared and process.worker is not None:
                found.setdefault(tenant.instances[0].device, []).append(process.worker.pid)
        return found

    async def is_ready(self) -> bool:
        if self.health.state is not HostState.READY:
            return False
        words = await asyncio.gather(*(each.says_ready() for each in self.instances if each.worker is not None))
        return all(words)

    # --- told by its processes

    def on_crash(self, how: str) -> float | None:
        """How long to wait before the restart; None if the model has given up."""
        delay_s = self._history.restart_delay_s(time.monotonic())
        if delay_s is None:
            self.give_up(self._history.surrender_text(how))
            return None
        self.on_outage(how)
        return delay_s

    def on_outage(self, how: str) -> float:
        """A process that it shares has ended through somebody else's fault: nothing is counted."""
        if any(instance.available for instance in self.instances):
            self._set_health(HostState.READY, "")
        else:
            self._set_health(HostState.RESTARTING, f"its process {how}; it starts again")
        return 0.0

    def on_restarted(self) -> None:
        self._set_health(HostState.READY, "")

    def give_up(self, reason: str) -> None:
        """UNAVAILABLE until it is loaded again; what is left of it ends and gives its memory back."""
        for process, tenant in self.tenants.values():
            process.abandon(tenant)
        self._set_health(HostState.FAILED, reason)
        if self._closing is None and self._is_started:
            self._closing = asyncio.ensure_future(self._close())

    def _set_health(self, state: HostState, reason: str) -> None:
        if self.health.state is HostState.FAILED:
            return
        self.health = HostHealth(state, reason, self._history.num_restarts)
        self._on_health(self.health)
