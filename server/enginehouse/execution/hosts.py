"""Loads models into the hosts where they live: threads of this process, or processes of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from enginehouse.backend import Backend, DeviceRoom, LoadContext, Placement
from enginehouse.config.backends import implementation_of
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument, ResourceExhausted
from enginehouse.execution import messages as m
from enginehouse.execution.backends import BACKEND_MODEL_OPTION, BackendSource, find_backend
from enginehouse.execution.contract import HostedModel, HostHealth, MemoryEntry, ServerServices
from enginehouse.execution.devices import CpuRuntime, CudaRuntime, DeviceInfo, DeviceRuntime, SimulatedRuntime
from enginehouse.execution.growth import GiveBack
from enginehouse.execution.host_policy import cores_of_policies
from enginehouse.execution.hosting_plan import declared_memory, memory_entries, plan_hosting
from enginehouse.execution.ledger import Booking, Ledger
from enginehouse.execution.mailbox import Mailbox
from enginehouse.execution.options import HostOptions, host_options
from enginehouse.execution.placement import Machine, placements, with_explicit_groups
from enginehouse.execution.process_host import HostProcess
from enginehouse.execution.process_model import ProcessHostedModel
from enginehouse.execution.process_pool import ProcessPool
from enginehouse.execution.running import as_error
from enginehouse.execution.services import LoopServices
from enginehouse.execution.supervision import SupervisionPolicy
from enginehouse.execution.supervisor import own_bytes
from enginehouse.execution.thread_host import ThreadHostedModel, load_in_threads

__all__ = ["HostOptions", "ModelHosts", "host_options"]


class ModelHosts:
    """contract.Hosts. `services` may be set until the first load: core and hosts need each other."""

    def __init__(
        self,
        services: ServerServices | None = None,
        options: HostOptions | None = None,
        runtimes: Sequence[DeviceRuntime] = (),
    ) -> None:
        self.services = services
        self.options = options or HostOptions()
        self.runtimes = runtimes or default_runtimes(self.options)
        devices = [device for runtime in self.runtimes for device in runtime.devices()]
        self.machine = Machine(
            [device.name for device in devices if self._is_usable_gpu(device)],
            self.options.cpu_for_missing_gpu,
            cores_of_policies(self.options.host_policies),
        )
        totals = {device.name: device.total_bytes for device in devices}
        self.ledger = Ledger(totals, limits_in_bytes(totals, self.options.memory_limits))
        self._backends: dict[str, Backend] = {}
        self._mailbox: Mailbox | None = None
        self._pool: ProcessPool | None = None
        self._loaded: list[HostedModel] = []

    def _is_usable_gpu(self, device: DeviceInfo) -> bool:
        capability = float(device.compute_capability or "inf")
        return device.name != "cpu" and capability >= self.options.min_compute_capability

    async def complete_config(self, context: LoadContext) -> ModelConfig:
        source = self._find(context)
        context = self._with_backend_options(context, source)
        backend = self._backend(source)
        explicit = with_explicit_groups(context.config, self.machine)
        plan = plan_hosting(explicit, backend, self.options.default_hosts)
        if plan.key_of is None:
            loop = asyncio.get_running_loop()
            try:
                completed = await loop.run_in_executor(None, backend.complete_config, context)
            except Exception as problem:
                raise as_error(problem) from problem
        else:
            wanted = placements(explicit, self.machine)
            policy = SupervisionPolicy.of_config(explicit, self.options.supervision)
            sent, key, solo = model_source(source, context), plan.key_of(wanted[0]), runs_solo(backend, wanted)
            answer = await self._processes().complete_config(sent, context, key, solo, policy.start_timeout_s)
            completed = ModelConfig.FromString(answer)
        return with_explicit_groups(completed, self.machine)

    def _find(self, context: LoadContext) -> BackendSource:
        name = implementation_of(context.config.backend)
        if name in self.options.more_backends:
            return BackendSource(name, self.options.more_backends[name])
        return find_backend(name, self.options.backend_directories)

    async def load(self, context: LoadContext, on_health: Callable[[HostHealth], None]) -> HostedModel:
        source = self._find(context)
        backend = self._backend(source)
        config = with_explicit_groups(context.config, replace(self.machine, free_by_gpu=self._free_by_gpu()))
        context = self._with_backend_options(replace(context, config=config), source)
        wanted = placements(config, self.machine)
        devices = {device for placement in wanted for device in (placement.device, *placement.more_devices)}
        self._check_load_limits(context.name, devices)
        needs = declared_memory(config) or backend.memory_needs(
            replace(context, rooms={device: self._room(device) for device in devices})
        )
        # what the backend has chosen is what its instances shall take, also after a restart
        if needs.kv_bytes:
            config.serving.memory.kv_bytes = needs.kv_bytes
        booking = self.ledger.book(memory_entries(context.name, context.version, needs, wanted))
        try:
            hosted = await self._load_into_host(source, backend, context, wanted, on_health, booking)
        except BaseException:
            self.ledger.release(booking)
            raise
        hosted.on_closed = partial(self._forget, hosted, booking)
        self._loaded.append(hosted)
        return hosted

    def _check_load_limits(self, model: str, devices: Collection[str]) -> None:
        """Raises ResourceExhausted for a GPU that is fuller than its limit allows."""
        for number, limit in self.options.gpu_load_limits.items():
            device = self.machine.gpus[number] if number < len(self.machine.gpus) else ""
            if device not in devices:
                continue
            runtime = next(r for r in self.runtimes if any(known.name == device for known in r.devices()))
            [total] = [known.total_bytes for known in runtime.devices() if known.name == device]
            used = runtime.used_bytes(device) / total
            if used > limit:
                raise ResourceExhausted(
                    f"model '{model}' can't be loaded onto {device}: {used:.0%} of its memory are used, "
                    f"--model-load-gpu-limit allows {limit:.0%}"
                )

    def _free_by_gpu(self) -> dict[str, int]:
        return {gpu: self._room(gpu).free_bytes for gpu in self.machine.gpus}

    def _room(self, device: str) -> DeviceRoom:
        """By the ledger, or by what the device itself says is used, whichever leaves less."""
        limit, free = self.ledger.limit_bytes(device), self.ledger.free_bytes(device)
        for runtime in self.runtimes:
            for known in runtime.devices():
                if known.name == device:
                    free = min(free, known.total_bytes - runtime.used_bytes(device))
        return DeviceRoom(limit, max(free, 0))

    def patience_s(self, config: ModelConfig) -> float:
        """How long a model that is to go may owe answers and give none."""
        return SupervisionPolicy.of_config(config, self.options.supervision).unload_timeout_s

    async def close(self) -> None:
        for hosted in list(self._loaded):
            await hosted.close()
        if self._pool is not None:
            await self._pool.close()

    @property
    def has_remains(self) -> bool:
        """After `close` or `end`: whether threads still run in models that should have gone."""
        return bool(self._loaded)

    async def end(self, why: str) -> None:
        for hosted in list(self._loaded):
            await hosted.end(why)
        await self.close()

    async def _load_into_host(
        self,
        source: BackendSource,
        backend: Backend,
        context: LoadContext,
        wanted: Sequence[Placement],
        on_health: Callable[[HostHealth], None],
        booking: Booking,
    ) -> ThreadHostedModel | ProcessHostedModel:
        plan = plan_hosting(context.config, backend, self.options.default_hosts)
        if plan.key_of is None:
            context = replace(context, services=self._services_for(context))
            return await load_in_threads(backend, context, wanted, self._results(), self.patience_s(context.config))
        pool = self._processes()
        launch = await pool.launch_for(context)
        solo = runs_solo(backend, wanted)
        hosted = ProcessHostedModel(
            context,
            model_source(source, context),
            SupervisionPolicy.of_config(context.config, self.options.supervision),
            plan.key_of,
            lambda key: pool.process(context, key, launch, solo),
            on_health,
        )
        hosted.book_growth = partial(self._book_growth, hosted, booking)
        await hosted.start(wanted)
        self._measure(hosted, booking)
        return hosted

    def _measure(self, hosted: ProcessHostedModel, booking: Booking) -> None:
        """What a model that claims nothing takes in processes of its own, on the host and on GPUs.

        In a process that it shares nobody can tell its bytes from the others': there it must claim them.
        """
        if any(not entry.measured for entry in booking.entries):
            return
        by_device: dict[str, int] = {}
        for device, pids in hosted.pids().items():
            by_device["cpu"] = by_device.get("cpu", 0) + sum(own_bytes(pid) for pid in pids)
            on_device = self._read_by_process(device)
            by_device[device] = by_device.get(device, 0) + sum(on_device.get(pid, 0) for pid in pids)
        entries = [
            MemoryEntry(hosted.name, hosted.version, device, "weights", num_bytes, measured=True)
            for device, num_bytes in by_device.items()
            if num_bytes
        ]
        self.ledger.replace(booking, entries)

    def _read_by_process(self, device: str) -> Mapping[int, int]:
        for runtime in self.runtimes:
            if device != "cpu" and any(known.name == device for known in runtime.devices()):
                return runtime.used_bytes_by_process(device)
        return {}

    def _book_growth(self, hosted: ProcessHostedModel, booking: Booking, num_bytes: int) -> GiveBack:
        entry = MemoryEntry(hosted.name, hosted.version, "cpu", "workspace", num_bytes, measured=True)
        self.ledger.extend(booking, [entry])
        return partial(self.ledger.give_back, booking, entry)

    def _forget(self, hosted: HostedModel, booking: Booking) -> None:
        self._loaded.remove(hosted)
        self.ledger.release(booking)

    @property
    def shared_processes(self) -> Sequence[HostProcess]:
        """Those that models share."""
        return self._pool.shared if self._pool is not None else ()

    def _processes(self) -> ProcessPool:
        if self._pool is None:
            self._pool = ProcessPool(self.services, self.runtimes, self.options.environment_cache)
        return self._pool

    def _services_for(self, context: LoadContext) -> LoopServices | None:
        if self.services is None:
            return None
        return LoopServices(self.services, asyncio.get_running_loop(), context.name, context.version)

    def _backend(self, source: BackendSource) -> Backend:
        if source.name not in self._backends:
            self._backends[source.name] = source.make()
        return self._backends[source.name]

    def _results(self) -> Mailbox:
        if self._mailbox is None:
            self._mailbox = Mailbox(asyncio.get_running_loop())
        return self._mailbox

    def _with_backend_options(self, context: LoadContext, source: BackendSource) -> LoadContext:
        settings = self.options.backend_settings
        options = {**settings.get("", {}), **settings.get(source.name, {}), **context.backend_options}
        if source.model_file:
            options[BACKEND_MODEL_OPTION] = source.model_file
        return replace(context, backend_options=options)


def runs_solo(backend: Backend, wanted: Sequence[Placement]) -> bool:
    """Whether a process of this model's own holds just one instance."""
    return backend.process_per_instance or len(wanted) == 1


def model_source(source: BackendSource, context: LoadContext) -> m.ModelSource:
    """What a worker is told to load."""
    return m.ModelSource(
        source.name,
        source.target,
        context.config.SerializeToString(),
        context.version,
        str(context.model_directory),
        dict(context.backend_options),
    )


def default_runtimes(options: HostOptions) -> Sequence[DeviceRuntime]:
    """What this machine has; simulated GPUs take the place of real ones."""
    if options.simulated_gpu_bytes:
        gpus = {f"simulated:{number}": size for number, size in enumerate(options.simulated_gpu_bytes)}
        return (CpuRuntime(), SimulatedRuntime(gpus))
    return (CpuRuntime(), CudaRuntime())


def limits_in_bytes(totals: Mapping[str, int], limits: Mapping[str, int | float]) -> dict[str, int]:
    """Raises InvalidArgument for a device that this machine lacks."""
    for device in limits:
        if device not in totals:
            raise InvalidArgument(f"memory limit for '{device}': this machine has {', '.join(totals)}")
    return {
        device: limit if isinstance(limit, int) else int(limit * totals[device]) for device, limit in limits.items()
    }
