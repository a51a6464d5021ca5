"""What devices this machine has and how full they are: one contract for the CPU, CUDA and a simulation.

The server process makes no CUDA context: NVML answers for GPUs. Simulated devices have byte budgets, so
placement, the ledger and eviction are tested on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import psutil


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """`name` is as in Placement: "cpu", "cuda:0". `compute_capability` is "" where there is none."""

    name: str
    total_bytes: int
    description: str = ""
    uuid: str = ""
    compute_capability: str = ""


class DeviceRuntime(Protocol):
    """Readings of one kind of device. Nothing here allocates."""

    def devices(self) -> Sequence[DeviceInfo]: ...

    def used_bytes(self, device: str) -> int:
        """By every process, ours or not."""
        ...

    def used_bytes_by_process(self, device: str) -> Mapping[int, int]:
        """What NVML or the kernel says of each process; empty where nobody tells."""
        ...

    def child_environment(self, device: str) -> Mapping[str, str]:
        """Variables for a process that shall see this device alone."""
        ...


class CpuRuntime:
    """Host memory."""

    def devices(self) -> Sequence[DeviceInfo]:
        return (DeviceInfo("cpu", psutil.virtual_memory().total, "host memory"),)

    def used_bytes(self, device: str) -> int:
        memory = psutil.virtual_memory()
        return int(memory.total - memory.available)

    def used_bytes_by_process(self, device: str) -> Mapping[int, int]:
        return {process.pid: process.info["memory_info"].rss for process in psutil.process_iter(["memory_info"])}

    def child_environment(self, device: str) -> Mapping[str, str]:
        return {}


class CudaRuntime:
    """GPUs through NVML. Without a driver there are no devices."""

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._available = True
        except pynvml.NVMLError:
            self._available = False

    def devices(self) -> Sequence[DeviceInfo]:
        if not self._available:
            return ()
        count = self._nvml.nvmlDeviceGetCount()
        return tuple(self._describe(index) for index in range(count))

    def _describe(self, index: int) -> DeviceInfo:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = self._nvml.nvmlDeviceGetCudaComputeCapability(handle)
        return DeviceInfo(
            f"cuda:{index}",
            int(self._nvml.nvmlDeviceGetMemoryInfo(handle).total),
            _text(self._nvml.nvmlDeviceGetName(handle)),
            _text(self._nvml.nvmlDeviceGetUUID(handle)),
            f"{major}.{minor}",
        )

    def _handle(self, device: str) -> object:
        return self._nvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2]))

    def used_bytes(self, device: str) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle(device)).used)

    def used_bytes_by_process(self, device: str) -> Mapping[int, int]:
        processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle(device))
        return {process.pid: int(process.usedGpuMemory or 0) for process in processes}

    def child_environment(self, device: str) -> Mapping[str, str]:
        # By UUID: NVML and CUDA may number the GPUs differently.
        handle = self._handle(device)
        return {"CUDA_VISIBLE_DEVICES": _text(self._nvml.nvmlDeviceGetUUID(handle))}


@dataclass(slots=True)
class SimulatedRuntime:
    """Devices that exist only as numbers; tests and the simulated backend move them."""

    totals: dict[str, int]
    used: dict[str, int] = field(default_factory=dict)

    def devices(self) -> Sequence[DeviceInfo]:
        return tuple(DeviceInfo(name, total, "simulated") for name, total in self.totals.items())

    def used_bytes(self, device: str) -> int:
        return self.used.get(device, 0)

    def used_bytes_by_process(self, device: str) -> Mapping[int, int]:
        return {}

    def child_environment(self, device: str) -> Mapping[str, str]:
        return {"ENGINEHOUSE_SIMULATED_DEVICE": device, "ENGINEHOUSE_SIMULATED_BYTES": str(self.totals[device])}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
