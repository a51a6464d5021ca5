"""Loads models into the hosts where they live: threads of this process, or processes of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from enginehouse.backend import Backend, HostKind, LoadContext, MemoryNeeds, Placement
from enginehouse.config.backends import implementation_of
from enginehouse.config.schema import ModelConfig, ModelServing
from enginehouse.errors import InvalidArgument
from enginehouse.execution import messages as m
from enginehouse.execution.backends import BACKEND_MODEL_OPTION, BackendSource, find_backend
from enginehouse.execution.contract import HostedModel, HostHealth, MemoryEntry, ServerServices
from enginehouse.execution.devices import CpuRuntime, CudaRuntime, DeviceRuntime, SimulatedRuntime
from enginehouse.execution.environments import Environments
from enginehouse.execution.ledger import Ledger
from enginehouse.execution.mailbox import Mailbox
from enginehouse.execution.parking import Parking
from enginehouse.execution.placement import Machine, placements, with_explicit_groups
from enginehouse.execution.process_host import HostProcess
from enginehouse.execution.process_model import ProcessHostedModel
from enginehouse.execution.process_services import ServiceDesk
from enginehouse.execution.running import as_error
from enginehouse.execution.services import LoopServices
from enginehouse.execution.slab import MIN_SEGMENT_BYTES
from enginehouse.execution.spawning import Launch, Spawner
from enginehouse.execution.supervision import SupervisionPolicy
from enginehouse.execution.supervisor import Supervisor
from enginehouse.execution.thread_host import ThreadHostedModel, load_in_threads

if TYPE_CHECKING:
    from enginehouse.options import ServerOptions


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What the server's options say about execution."""

    backend_directories: Sequence[Path] = ()
    cpu_for_missing_gpu: bool = False
    """Run KIND_GPU groups on the CPU where there is no GPU, instead of refusing the model."""
    memory_limits: Mapping[str, int | float] = field(default_factory=dict)
    """By device ("cpu", "cuda:0", …): bytes that models may use, or a fraction; without one, all of it."""
    supervision: SupervisionPolicy = field(default_factory=SupervisionPolicy)
    """What holds for a model whose config says nothing else."""
    backend_settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """From --backend-config, by backend; "" is for every backend."""
    default_hosts: Mapping[str, HostKind] = field(default_factory=dict)
    """By backend, where the config doesn't say."""
    simulated_gpu_bytes: Sequence[int] = ()
    environment_cache: Path | None = None
    """Where models' own Python environments are kept; the user's cache folder by default."""
    more_backends: Mapping[str, str] = field(default_factory=dict)
    """`module:class` by name, beside those that are installed."""


def host_options(options: ServerOptions) -> HostOptions:
    """What the command line says about execution."""
    directory = options.backend_directory
    defaults = {setting.key: HostKind(setting.value) for setting in options.default_host}
    return HostOptions(
        backend_directories=[Path(directory)] if directory else [],
        cpu_for_missing_gpu=options.allow_cpu_fallback,
        memory_limits={limit.device: limit.num_bytes or limit.fraction for limit in options.memory_limit},
        supervision=SupervisionPolicy(
            max_restarts=options.host_restart_limit,
            window_s=options.host_restart_window_secs,
            stopped_timeout_s=options.host_heartbeat_timeout_secs,
            start_timeout_s=options.host_start_timeout_secs,
        ),
        backend_settings=options.backend_options,
        default_hosts=defaults,
        simulated_gpu_bytes=options.simulated_device,
    )


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
            [device.name for device in devices if device.name != "cpu"], self.options.cpu_for_missing_gpu
        )
        totals = {device.name: device.total_bytes for device in devices}
        self.ledger = Ledger(totals, limits_in_bytes(totals, self.options.memory_limits))
        self._backends: dict[str, Backend] = {}
        self._mailbox: Mailbox | None = None
        self._desk: ServiceDesk | None = None
        self._parking = Parking()
        self._supervisor = Supervisor()
        self._spawner = Spawner()
        self._environments = Environments(self.options.environment_cache)
        self._loaded: list[HostedModel] = []

    async def complete_config(self, context: LoadContext) -> ModelConfig:
        source = self._find(context)
        context = self._with_backend_options(context, source)
        backend = self._backend(source)
        if wanted_host(context.config, backend, self.options.default_hosts) is HostKind.THREAD:
            loop = asyncio.get_running_loop()
            try:
                completed = await loop.run_in_executor(None, backend.complete_config, context)
            except Exception as problem:
                raise as_error(problem) from problem
        else:
            completed = await self._complete_in_process(source, backend, context)
        return with_explicit_groups(completed, self.machine)

    async def _complete_in_process(self, source: BackendSource, backend: Backend, context: LoadContext) -> ModelConfig:
        """The process stays for a while: the load that follows is its first tenant."""
        launch = await self._environments.launch_for(context)
        process = self._new_process(context.name, "", launch, self._runs_solo(backend, context.config))
        sent = model_source(source, context)
        policy = SupervisionPolicy.of_config(context.config, self.options.supervision)
        try:
            completed = await process.complete_config(sent, policy.start_timeout_s)
        except BaseException:
            await process.close()
            raise
        await self._parking.park((sent.model_directory, sent.version), process)
        return ModelConfig.FromString(completed)

    def _runs_solo(self, backend: Backend, config: ModelConfig) -> bool:
        """Whether a process of this model holds just one instance."""
        if backend.process_per_instance:
            return True
        return len(placements(with_explicit_groups(config, self.machine), self.machine)) == 1

    def _find(self, context: LoadContext) -> BackendSource:
        name = implementation_of(context.config.backend)
        if name in self.options.more_backends:
            return BackendSource(name, self.options.more_backends[name])
        return find_backend(name, self.options.backend_directories)

    async def load(self, context: LoadContext, on_health: Callable[[HostHealth], None]) -> HostedModel:
        source = self._find(context)
        backend = self._backend(source)
        config = with_explicit_groups(context.config, self.machine)
        context = self._with_backend_options(replace(context, config=config), source)
        wanted = placements(config, self.machine)
        self.ledger.book(self._needs(backend, context, wanted))
        try:
            hosted = await self._load_into_host(source, backend, context, wanted, on_health)
        except BaseException:
            self.ledger.release(context.name, context.version)
            raise
        return hosted

    async def close(self) -> None:
        await self._parking.close()
        for hosted in list(self._loaded):
            await hosted.close()
        await self._supervisor.close()
        self._spawner.close()

    async def _load_into_host(
        self,
        source: BackendSource,
        backend: Backend,
        context: LoadContext,
        wanted: Sequence[Placement],
        on_health: Callable[[HostHealth], None],
    ) -> HostedModel:
        hosted: ThreadHostedModel | ProcessHostedModel
        if wanted_host(context.config, backend, self.options.default_hosts) is HostKind.THREAD:
            context = replace(context, services=self._services_for(context))
            hosted = await load_in_threads(backend, context, wanted, self._results())
        else:
            launch = await self._environments.launch_for(context)
            hosted = self._in_processes(source, backend, context, launch, on_health)
            await hosted.start(wanted)
        hosted.on_closed = partial(self._forget, hosted, context.name, context.version)
        self._loaded.append(hosted)
        return hosted

    def _in_processes(
        self,
        source: BackendSource,
        backend: Backend,
        context: LoadContext,
        launch: Launch,
        on_health: Callable[[HostHealth], None],
    ) -> ProcessHostedModel:
        apart = backend.process_per_instance
        policy = SupervisionPolicy.of_config(context.config, self.options.supervision)
        solo = self._runs_solo(backend, context.config)
        key = (str(context.model_directory), context.version)

        def make_process(instance: str) -> HostProcess:
            parked = self._parking.take(key)
            if parked is not None and parked.is_solo == solo and parked.launch == launch and parked.is_running:
                parked.name = process_name(context.name, instance if apart else "")
                return parked
            return self._new_process(context.name, instance if apart else "", launch, solo)

        sent = model_source(source, context)
        return ProcessHostedModel(context, sent, policy, make_process, apart, on_health)

    def _new_process(self, model: str, instance: str, launch: Launch, solo: bool) -> HostProcess:
        name = process_name(model, instance)
        process = HostProcess(name, self._spawner, launch, self._service_desk(), solo, MIN_SEGMENT_BYTES)
        self._supervisor.watch(process)
        return process

    def _forget(self, hosted: HostedModel, name: str, version: int) -> None:
        self._loaded.remove(hosted)
        self.ledger.release(name, version)

    def _service_desk(self) -> ServiceDesk:
        if self._desk is None:
            self._desk = ServiceDesk(self.services)
        return self._desk

    def _needs(self, backend: Backend, context: LoadContext, wanted: Sequence[Placement]) -> list[MemoryEntry]:
        needs = declared_memory(context.config) or backend.memory_needs(context)
        entries: list[MemoryEntry] = []
        by_device: dict[str, int] = {}
        for placement in wanted:
            by_device[placement.device] = by_device.get(placement.device, 0) + 1
        for device, count in by_device.items():
            for kind, num_bytes in (
                ("weights", needs.weights_bytes),
                ("workspace", needs.workspace_bytes_per_instance * count),
                ("kv", needs.kv_bytes),
            ):
                if num_bytes:
                    entries.append(MemoryEntry(context.name, context.version, device, kind, num_bytes))
        return entries

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


def process_name(model: str, instance: str) -> str:
    """How errors call a process."""
    return f"the process of model '{model}'" + (f" (instance '{instance}')" if instance else "")


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


def declared_memory(config: ModelConfig) -> MemoryNeeds | None:
    """What the config's `serving.memory` claims; None where it claims nothing."""
    memory = config.serving.memory
    if not (memory.weights_bytes or memory.workspace_bytes_per_instance or memory.kv_bytes):
        return None
    return MemoryNeeds(memory.weights_bytes, memory.workspace_bytes_per_instance, memory.kv_bytes)


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


def wanted_host(config: ModelConfig, backend: Backend, defaults: Mapping[str, HostKind]) -> HostKind:
    """The config's `serving.host`, else the server's default for the backend, else what the backend prefers.

    Raises InvalidArgument for a thread host that the backend can't live in.
    """
    chosen = {
        ModelServing.HOST_THREAD: HostKind.THREAD,
        ModelServing.HOST_PROCESS: HostKind.PROCESS,
        ModelServing.HOST_DEVICE: HostKind.DEVICE,
    }
    wanted = chosen.get(config.serving.host) or defaults.get(config.backend) or backend.host_kind(config)
    if wanted is HostKind.THREAD and backend.process_per_instance:
        raise InvalidArgument(f"model '{config.name}': backend '{config.backend}' runs in processes, not in threads")
    return wanted
