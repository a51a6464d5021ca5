"""The worker processes of a server: started, parked, shared between models, and watched."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from enginehouse.backend import LoadContext
from enginehouse.execution import messages as m
from enginehouse.execution.contract import ServerServices
from enginehouse.execution.devices import DeviceRuntime
from enginehouse.execution.environments import Environments
from enginehouse.execution.hosting_plan import ProcessKey, first_segment_bytes
from enginehouse.execution.parking import Parking
from enginehouse.execution.process_host import HostProcess
from enginehouse.execution.process_services import ServiceDesk
from enginehouse.execution.spawning import Launch, Spawner, raise_descriptor_limit
from enginehouse.execution.supervisor import Supervisor


class ProcessPool:
    """One per server; on the loop."""

    def __init__(self, services: ServerServices | None, runtimes: Sequence[DeviceRuntime], cache: Path | None) -> None:
        raise_descriptor_limit()
        self._desk = ServiceDesk(services)
        self._runtime_by_device = {device.name: runtime for runtime in runtimes for device in runtime.devices()}
        self._environments = Environments(cache)
        self._spawner = Spawner()
        self._supervisor = Supervisor()
        self._parking = Parking()
        self._shared: dict[tuple[ProcessKey, str], HostProcess] = {}

    async def launch_for(self, context: LoadContext) -> Launch:
        """May take minutes: an environment may have to be made."""
        return await self._environments.launch_for(context)

    async def complete_config(
        self, source: m.ModelSource, context: LoadContext, key: ProcessKey, solo: bool, timeout_s: float
    ) -> bytes:
        """In the process where the model will live: one of its own stays for the load that follows."""
        launch = await self.launch_for(context)
        process = self.process(context, key, launch, solo)
        try:
            completed = await process.complete_config(source, timeout_s)
        except BaseException:
            await process.close_if_empty()
            raise
        if not key.shared:
            await self._parking.park((source.model_directory, source.version), process)
        return completed

    def process(self, context: LoadContext, key: ProcessKey, launch: Launch, solo: bool) -> HostProcess:
        """The process for that key: a parked one, one that others use, or a new one."""
        launch = self._for_device(launch, key.device)
        if key.shared:
            return self._shared_process(key, launch)
        name = process_name(context.name, key.name)
        parked = self._parking.take((str(context.model_directory), context.version))
        if parked is not None and parked.fits(launch, solo):
            parked.name = name
            return parked
        if parked is not None:
            self._parking.end(parked)
        return self._new(name, launch, solo, first_segment_bytes(context.config))

    def _shared_process(self, key: ProcessKey, launch: Launch) -> HostProcess:
        place = (key, launch.interpreter)
        if place not in self._shared:
            what = f"group '{key.name}'" if key.name else f"device {key.device}"
            what += f" on {key.device}" if key.name and key.device else ""
            process = self._new(f"the process of {what}", launch, False, 0)
            process.local_device = "cuda:0" if "CUDA_VISIBLE_DEVICES" in launch.variables else ""
            process.when_closing(lambda _: self._forget(place))
            self._shared[place] = process
        return self._shared[place]

    @property
    def shared(self) -> Sequence[HostProcess]:
        return list(self._shared.values())

    def _forget(self, place: tuple[ProcessKey, str]) -> None:
        del self._shared[place]

    def _new(self, name: str, launch: Launch, solo: bool, first_bytes: int) -> HostProcess:
        process = HostProcess(name, self._spawner, launch, self._desk, solo, first_bytes)
        self._supervisor.watch(process)
        return process

    def _for_device(self, launch: Launch, device: str) -> Launch:
        variables: dict[str, str] = {}
        for name in device.split(","):
            runtime = self._runtime_by_device.get(name)
            for key, value in (runtime.child_environment(name) if runtime is not None else {}).items():
                variables[key] = f"{variables[key]},{value}" if key in variables else value
        return replace(launch, variables={**launch.variables, **variables}) if variables else launch

    async def close(self) -> None:
        await self._parking.close()
        await asyncio.gather(*(process.close() for process in list(self._shared.values())))
        await self._supervisor.close()
        self._spawner.close()


def process_name(model: str, instance: str) -> str:
    """How errors call a process."""
    return f"the process of model '{model}'" + (f" (instance '{instance}')" if instance else "")
