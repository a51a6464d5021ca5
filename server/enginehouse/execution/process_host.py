"""Models in processes of their own: started, supervised, restarted, and gone with every byte when unloaded.

A HostProcess carries one or more tenants (a model with some of its instances). When it ends by itself the
models that were running are counted as crashed; it is started again after a back-off, or they give up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from enginehouse.errors import EnginehouseError, Unavailable
from enginehouse.execution import messages as m
from enginehouse.execution.growth import GiveBack, not_booked
from enginehouse.execution.open_calls import NoAnswer
from enginehouse.execution.process import WorkerProcess
from enginehouse.execution.process_instances import ProcessInstance
from enginehouse.execution.process_services import ServiceDesk
from enginehouse.execution.slab import first_segments
from enginehouse.execution.spawning import Launch, Spawner

if TYPE_CHECKING:
    from enginehouse.execution.process_model import ProcessHostedModel

STOP_GRACE_S = 2.0
UNLOAD_TIMEOUT_S = 30.0
"""For a model's own last words."""
STUCK_WHILE_LEAVING = "was to go and answered nothing for too long"

logger = logging.getLogger("enginehouse.execution")


@dataclass(eq=False)
class Tenant:
    """A model with some of its instances, in one HostProcess."""

    model: ProcessHostedModel
    instances: list[ProcessInstance]
    model_id: int = 0


class HostProcess:
    """One supervised worker process."""

    def __init__(
        self, name: str, spawner: Spawner, launch: Launch, desk: ServiceDesk, solo: bool, first_bytes: int
    ) -> None:
        self.name = name
        self._spawner = spawner
        self.is_solo = solo
        self.tenants: list[Tenant] = []
        self.worker: WorkerProcess | None = None
        self.launch = launch
        self._desk = desk
        self._first_bytes = first_bytes
        self._closing = False
        self._restarting: asyncio.Task[None] | None = None
        self.stopped_since_s: float | None = None
        self.local_device = ""
        """What instances are told where the process sees one GPU alone; "" for their placement's device."""
        self._closing_calls: list[Callable[[HostProcess], None]] = []
        self._num_loading = 0
        self._starting = asyncio.Lock()

    def when_closing(self, call: Callable[[HostProcess], None]) -> None:
        """Called once it takes no more tenants."""
        self._closing_calls.append(call)

    def _note_closing(self) -> None:
        calls, self._closing_calls = self._closing_calls, []
        for call in calls:
            call(self)

    def fits(self, launch: Launch, solo: bool) -> bool:
        """Whether a parked one is what is wanted."""
        return self.is_running and self.is_solo == solo and self.launch == launch

    @property
    def is_running(self) -> bool:
        return self.worker is not None and self.worker.alive

    async def complete_config(self, source: m.ModelSource, timeout_s: float) -> bytes:
        """A serialized ModelConfig. Raises what the backend raises."""
        worker = await self._running_worker()
        self._num_loading += 1
        try:
            completed: bytes = await worker.call(lambda call_id: m.CompleteConfig(call_id, source), timeout_s)
        finally:
            self._num_loading -= 1
        return completed

    # --- its tenants

    async def attach(self, tenant: Tenant) -> None:
        """Loads the tenant, starting the process if it doesn't run. Raises what loading raises."""
        worker = await self._running_worker()
        worker.what = self.name
        self.tenants.append(tenant)
        self._num_loading += 1
        try:
            await self._load(worker, tenant)
        except BaseException:
            self.tenants.remove(tenant)
            if self.tenants:
                await self._unload_quietly(tenant)
            await self.close_if_empty()
            raise
        finally:
            self._num_loading -= 1

    async def detach(self, tenant: Tenant) -> None:
        """Unloads the tenant; the process ends with its last one."""
        if tenant in self.tenants:
            self.tenants.remove(tenant)
        await self._unload_quietly(tenant)
        await self.close_if_empty()

    async def add_instances(self, tenant: Tenant, instances: Sequence[ProcessInstance]) -> None:
        if self._restarting is not None:
            await asyncio.wait([self._restarting])
        worker = await self._running_worker()
        for instance in instances:
            await self._create(worker, tenant, instance)
            tenant.instances.append(instance)

    async def remove_instance(self, tenant: Tenant, instance: ProcessInstance) -> None:
        tenant.instances.remove(instance)
        if not await instance.retire():
            await self.end_for(instance, STUCK_WHILE_LEAVING)
        worker = instance.worker
        instance.worker = None
        if worker is not None and worker.alive:
            await self._tell_quietly(worker, tenant, [partial(_close, instance.instance_id)])

    async def _running_worker(self) -> WorkerProcess:
        async with self._starting:  # models that are loaded at once want the same one
            if self.worker is None or not self.worker.alive:
                self.worker = await self._start_worker()
            return self.worker

    async def _start_worker(self) -> WorkerProcess:
        mode = "solo" if self.is_solo else "shared"
        self._closing = False
        try:
            await self._spawner.prepare(self.launch)
            child, sock = await self._spawner.spawn(self.launch, [mode])
        except OSError as problem:
            raise Unavailable(f"{self.name} can't be started: {problem}") from problem
        try:
            # large ones take many ms, which other models' requests must not wait for
            segments = await asyncio.get_running_loop().run_in_executor(None, first_segments, self._first_bytes)
        except BaseException as problem:
            sock.close()
            child.reap()
            if isinstance(problem, OSError):
                raise Unavailable(f"{self.name} can't be started: {problem}") from problem
            raise
        return WorkerProcess(child, sock, self.name, self._on_service, self._on_end, segments, self._book_growth)

    def _book_growth(self, num_bytes: int) -> GiveBack:
        book = self.tenants[0].model.book_growth if len(self.tenants) == 1 else not_booked
        return book(num_bytes)

    async def _load(self, worker: WorkerProcess, tenant: Tenant) -> None:
        model = tenant.model
        tenant.model_id = worker.new_id()
        await worker.call(lambda call_id: m.Load(call_id, tenant.model_id, model.source), model.policy.start_timeout_s)
        for instance in tenant.instances:
            await self._create(worker, tenant, instance)

    def _local_names(self, more_devices: tuple[str, ...]) -> tuple[str, ...]:
        """In a process that sees its own GPUs alone they are numbered anew."""
        if not self.local_device:
            return more_devices
        return tuple(f"cuda:{number}" for number in range(1, len(more_devices) + 1))

    async def _create(self, worker: WorkerProcess, tenant: Tenant, instance: ProcessInstance) -> None:
        instance.instance_id = worker.new_id()
        generative = tenant.model.generative_of(instance)
        worker.engine_events[instance.instance_id] = generative.generations.on_events
        instance.slot = worker.take_slot()
        placement = instance.placement
        instance.kind = await worker.call(
            lambda call_id: m.Create(
                call_id,
                tenant.model_id,
                instance.instance_id,
                instance.slot,
                placement.name,
                self.local_device or placement.device,
                placement.group,
                placement.cpu_cores,
                self._local_names(placement.more_devices),
            ),
            tenant.model.policy.start_timeout_s,
        )
        if instance.kind == "generative":
            tenant.model.generative = generative
        instance.worker = worker

    async def _unload_quietly(self, tenant: Tenant) -> None:
        worker = self.worker
        if worker is None or not worker.alive:
            return
        calls: list[Callable[[int], Any]] = [
            *(partial(_close, instance.instance_id) for instance in tenant.instances if instance.worker is worker),
            partial(_unload, tenant.model_id),
        ]
        await self._tell_quietly(worker, tenant, calls)

    async def _tell_quietly(self, worker: WorkerProcess, tenant: Tenant, calls: Sequence[Callable[[int], Any]]) -> None:
        """What goes, goes: a model's complaint is logged, and one that says nothing goes with its process."""
        try:
            for call in calls:
                try:
                    await worker.call(call, UNLOAD_TIMEOUT_S)
                except NoAnswer:
                    raise
                except EnginehouseError as problem:
                    logger.warning("model '%s' did not close cleanly: %s", tenant.model.name, problem)
        except NoAnswer:
            worker.end_for_a_tenant(f"was ended: model '{tenant.model.name}' did not unload in time")

    async def evict(self, tenant: Tenant, why: str) -> None:
        """Ends the tenant with the process. Others in it are loaded again and not blamed."""
        if tenant in self.tenants:
            self.tenants.remove(tenant)
        worker = self.worker
        if worker is not None and worker.alive and any(i.worker is worker for i in tenant.instances):
            self._closing = not self.tenants
            worker.end_for_a_tenant(f"was ended: model '{tenant.model.name}' {why}")
            await worker.ended
        await self.close_if_empty()

    async def end_for(self, instance: ProcessInstance, why: str) -> None:
        """Ends the process because one instance of it is stuck; the others in it are loaded again."""
        if instance.worker is not None and instance.worker.alive:
            worker = instance.worker
            worker.end_for_a_tenant(f"was ended: instance '{instance.name}' {why}")
            await worker.ended

    def abandon(self, tenant: Tenant) -> None:
        """The tenant has given up: it won't be restarted. The process goes if nobody else is in it."""
        if tenant in self.tenants:
            self.tenants.remove(tenant)
        if not self.tenants:
            self._closing = True
            if self.worker is not None:
                self.worker.kill("was ended because its model had given up")
            self._note_closing()

    async def close(self) -> None:
        self._closing = True
        if self._restarting is not None:
            self._restarting.cancel()
        self._note_closing()
        if self.worker is not None:
            await self.worker.stop(STOP_GRACE_S)

    async def close_if_empty(self) -> None:
        if not self.tenants and self._num_loading <= 1:
            await self.close()

    # --- what the worker says, and its end

    def _on_service(self, worker: WorkerProcess, message: Any) -> None:
        if isinstance(message, m.Refused):
            for tenant in self.tenants:
                for instance in tenant.instances:
                    if instance.instance_id == message.instance_id and tenant.model.generative is not None:
                        tenant.model.generative.on_refused(message.request_id, message.error.error())
            return
        for tenant in self.tenants:
            if tenant.model_id == getattr(message, "model_id", tenant.model_id):
                self._desk.handle(worker, message, tenant.model.name, tenant.model.version)
                return
        self._desk.handle(worker, message, self.name, 0)  # while a config is being completed

    def _on_end(self, worker: WorkerProcess, how: str) -> None:
        self._desk.forget(worker)
        if self._closing or worker is not self.worker:
            return
        loaded = [t for t in self.tenants if any(i.worker is worker for i in t.instances)]
        busy = worker.busy_at_end
        suspects = [t for t in loaded if any(i.instance_id in busy for i in t.instances)]
        if worker.ended_for_a_tenant:
            suspects = []
        elif not suspects and not self._num_loading:
            suspects = loaded  # nobody did anything: whoever is there shares the blame
        delay_s = 0.0
        for tenant in loaded:
            for instance in tenant.instances:
                instance.worker = None
            if tenant.model.generative is not None:
                tenant.model.generative.fail_all(f"{self.name} {how}")
            verdict_s = tenant.model.on_crash(how) if tenant in suspects else tenant.model.on_outage(how)
            if verdict_s is not None:
                delay_s = max(delay_s, verdict_s)
        if self.tenants and loaded:
            self._restarting = asyncio.get_running_loop().create_task(self._restart(delay_s))

    async def _restart(self, delay_s: float) -> None:
        """Again and again until it runs or everyone in it has given up."""
        while self.tenants:
            await asyncio.sleep(delay_s)
            try:
                worker = await self._running_worker()
                break
            except EnginehouseError as problem:
                verdicts = [tenant.model.on_crash(str(problem)) for tenant in list(self.tenants)]
                delay_s = max([verdict for verdict in verdicts if verdict is not None], default=0.0)
        else:
            return
        try:
            for tenant in list(self.tenants):
                await self._load(worker, tenant)
                tenant.model.on_restarted()
        except EnginehouseError as problem:
            if self._restarting is not asyncio.current_task():
                return  # it ended, and the next start is under way
            for tenant in self.tenants:  # so that its end finds whom to count it against
                for instance in tenant.instances:
                    instance.worker = instance.worker or worker
            if worker.alive:
                worker.kill(f"could not load its model again: {problem}")
            else:  # its end found nobody in it yet
                self._on_end(worker, worker.ended.result())


def _close(instance_id: int, call_id: int) -> m.Close:
    return m.Close(call_id, instance_id)


def _unload(model_id: int, call_id: int) -> m.Unload:
    return m.Unload(call_id, model_id)
