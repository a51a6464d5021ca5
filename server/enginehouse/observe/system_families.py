"""What the machine does: CPU and memory by psutil, GPUs by NVML, read at most once an interval.

NVML reads without a CUDA context, so the server's process never holds memory on a GPU.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil

from enginehouse.types import MetricFamily

logger = logging.getLogger(__name__)

GPU_FAMILIES: tuple[tuple[str, str, str], ...] = (
    ("nv_gpu_utilization", "gauge", "GPU utilization rate [0.0 - 1.0)"),
    ("nv_gpu_memory_total_bytes", "gauge", "GPU total memory, in bytes"),
    ("nv_gpu_memory_used_bytes", "gauge", "GPU used memory, in bytes"),
    ("nv_gpu_power_usage", "gauge", "GPU power usage in watts"),
    ("nv_gpu_power_limit", "gauge", "GPU power management limit in watts"),
    ("nv_energy_consumption", "counter", "GPU energy consumption in joules since the Triton Server started"),
)


class CpuReader:
    """Utilization is the share of all cores since the reading before."""

    def __init__(self, interval_ns: int, now_ns: int) -> None:
        self._interval_ns = interval_ns
        self._read_ns = now_ns
        self._last = _busy_and_total()
        self._utilization = 0.0

    def families(self, now_ns: int) -> Iterator[MetricFamily]:
        if now_ns - self._read_ns >= self._interval_ns:
            busy, total = _busy_and_total()
            elapsed = total - self._last[1]
            self._utilization = (busy - self._last[0]) / elapsed if elapsed > 0 else 0.0
            self._last, self._read_ns = (busy, total), now_ns
        memory = psutil.virtual_memory()
        yield _gauge(
            "nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", min(1.0, max(0.0, self._utilization))
        )
        yield _gauge("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", memory.total)
        yield _gauge(
            "nv_cpu_memory_used_bytes", "CPU used memory (RAM), in bytes", memory.total - memory.available
        )


def _busy_and_total() -> tuple[float, float]:
    times = psutil.cpu_times()
    total = float(sum(times))
    return total - times.idle - getattr(times, "iowait", 0.0), total


def _gauge(name: str, text: str, value: float, labels: Mapping[str, str] | None = None) -> MetricFamily:
    return MetricFamily(name, "gauge", text, [("", labels or {}, value)])


class GpuReader:
    """All GPUs that NVML shows. A reading that a card doesn't offer is left out."""

    def __init__(self, nvml: Any, interval_ns: int) -> None:
        self._nvml = nvml
        self._interval_ns = interval_ns
        self._read_ns = -interval_ns
        self._handles = {}
        self._energy_at_start_mj: dict[str, int] = {}
        self._families: list[MetricFamily] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.nvmlDeviceGetUUID(handle)
            self._handles[uuid if isinstance(uuid, str) else uuid.decode()] = handle
        for uuid, handle in self._handles.items():
            with contextlib.suppress(nvml.NVMLError):
                self._energy_at_start_mj[uuid] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    @classmethod
    def open(cls, interval_ns: int) -> GpuReader | None:
        """None where there is no NVIDIA driver or no GPU."""
        import pynvml  # here: the server starts without it being touched where metrics of GPUs are off

        try:
            pynvml.nvmlInit()
            reader = cls(pynvml, interval_ns)
        except pynvml.NVMLError as error:
            logger.info("GPU metrics are off: %s", error)
            return None
        return reader if reader._handles else None

    def families(self, now_ns: int) -> list[MetricFamily]:
        if now_ns - self._read_ns >= self._interval_ns:
            self._read_ns = now_ns
            self._families = self._read()
        return self._families

    def _read(self) -> list[MetricFamily]:
        samples: dict[str, list[tuple[str, Mapping[str, str], float]]] = {
            name: [] for name, _, _ in GPU_FAMILIES
        }
        for uuid, handle in self._handles.items():
            for name, read in self._readings(uuid, handle).items():
                with contextlib.suppress(self._nvml.NVMLError):
                    samples[name].append(("", {"gpu_uuid": uuid}, read()))
        return [MetricFamily(name, kind, text, samples[name]) for name, kind, text in GPU_FAMILIES]

    def _readings(self, uuid: str, handle: Any) -> dict[str, Callable[[], float]]:
        nvml = self._nvml
        at_start_mj = self._energy_at_start_mj.get(uuid, 0)
        return {
            "nv_gpu_utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "nv_gpu_memory_total_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
            "nv_gpu_memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "nv_gpu_power_usage": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "nv_gpu_power_limit": lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
            "nv_energy_consumption": lambda: (
                (nvml.nvmlDeviceGetTotalEnergyConsumption(handle) - at_start_mj) / 1000
            ),
        }

    def close(self) -> None:
        self._nvml.nvmlShutdown()
