"""A version whose instances live in processes: what the server sees of it, whatever happens to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from enginehouse.backend import LoadContext, Placement
from enginehouse.errors import EnginehouseError
from enginehouse.execution import messages as m
from enginehouse.execution.contract import HostHealth, HostState
from enginehouse.execution.joiners import joiner_of
from enginehouse.execution.process_host import HostProcess, ProcessGenerative, ProcessInstance, Tenant
from enginehouse.execution.supervision import CrashHistory, SupervisionPolicy

MakeProcess = Callable[[str], HostProcess]
"""A process for that name: new, or one that others use too."""


class ProcessHostedModel:
    """contract.HostedModel. With `process_per_instance` each instance has a process of its own."""

    def __init__(
        self,
        context: LoadContext,
        source: m.ModelSource,
        policy: SupervisionPolicy,
        make_process: MakeProcess,
        process_per_instance: bool,
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
        self.tenants: list[tuple[HostProcess, Tenant]] = []
        self.on_closed: Callable[[], None] = lambda: None
        self.health = HostHealth(HostState.READY)
        self._make_process = make_process
        self._process_per_instance = process_per_instance
        self._on_health = on_health
        self._history = CrashHistory(policy)

    @property
    def all_instances(self) -> list[ProcessInstance]:
        return [instance for _, tenant in self.tenants for instance in tenant.instances]

    @property
    def instances(self) -> Sequence[ProcessInstance]:
        return [instance for instance in self.all_instances if not instance.placement.passive]

    def generative_of(self, instance: ProcessInstance) -> ProcessGenerative:
        return self.generative or ProcessGenerative(instance)

    # --- loading

    async def start(self, placements: Sequence[Placement]) -> None:
        """Raises what loading raises, with nothing left running."""
        if self._process_per_instance:
            shares: list[list[Placement]] = [[placement] for placement in placements]
        else:
            shares = [list(placements)]
        started = await asyncio.gather(*(self._add_tenant(s) for s in shares), return_exceptions=True)
        for problem in started:
            if problem is not None:
                await self._detach_all()
                raise problem
        order = {placement.name: place for place, placement in enumerate(placements)}
        self.tenants.sort(key=lambda entry: order[entry[1].instances[0].name])

    async def _add_tenant(self, placements: Sequence[Placement]) -> None:
        tenant = Tenant(self, [ProcessInstance(self, placement) for placement in placements])
        process = self._make_process(placements[0].name if self._process_per_instance else self.name)
        await process.attach(tenant)
        self.tenants.append((process, tenant))

    async def set_instances(self, placements: Sequence[Placement]) -> None:
        wanted = {placement.name: placement for placement in placements}
        present = {instance.name: instance for instance in self.all_instances}
        gone = [i for name, i in present.items() if wanted.get(name) != i.placement]
        new = [p for name, p in wanted.items() if name not in present or present[name].placement != p]
        if self._process_per_instance:
            for placement in new:
                await self._add_tenant([placement])
        else:
            process, tenant = self.tenants[0]
            await process.add_instances(tenant, [ProcessInstance(self, placement) for placement in new])
        for instance in gone:
            await self._remove(instance)

    async def _remove(self, instance: ProcessInstance) -> None:
        for process, tenant in list(self.tenants):
            if instance not in tenant.instances:
                continue
            if self._process_per_instance:
                self.tenants.remove((process, tenant))
                await instance.idle.wait()
                await process.detach(tenant)
            else:
                await process.remove_instance(tenant, instance)

    async def close(self) -> None:
        await self._detach_all()
        self.on_closed()

    async def _detach_all(self) -> None:
        tenants, self.tenants = self.tenants, []
        for process, tenant in tenants:
            await process.detach(tenant)

    async def is_ready(self) -> bool:
        if self.health.state is not HostState.READY:
            return False
        for instance in self.instances:
            if instance.worker is None:
                continue
            try:
                if not await instance.worker.call(partial(_probe, instance.instance_id)):
                    return False
            except EnginehouseError:
                return False
        return True

    # --- told by its processes

    def on_crash(self, how: str) -> float | None:
        """How long to wait before the restart; None if the model has given up."""
        delay_s = self._history.restart_delay_s(time.monotonic())
        if delay_s is None:
            self.give_up(self._history.surrender_text(how))
            return None
        if any(instance.available for instance in self.instances):
            self._set_health(HostState.READY, "")
        else:
            self._set_health(HostState.RESTARTING, f"its process {how}; it starts again")
        return delay_s

    def on_restarted(self) -> None:
        self._set_health(HostState.READY, "")

    def give_up(self, reason: str) -> None:
        """UNAVAILABLE until it is loaded again; what is left of it ends."""
        for process, tenant in self.tenants:
            process.abandon(tenant)
        self._set_health(HostState.FAILED, reason)

    def _set_health(self, state: HostState, reason: str) -> None:
        if self.health.state is HostState.FAILED:
            return
        self.health = HostHealth(state, reason, self._history.num_restarts)
        self._on_health(self.health)


def _probe(instance_id: int, call_id: int) -> m.Probe:
    return m.Probe(call_id, instance_id)
