"""Where a model's instances live: in threads, in processes of its own, or in a process that others use too.

Pure: config, backend and placements in, the plan out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from enginehouse.backend import Backend, HostKind, MemoryNeeds, Placement
from enginehouse.config.schema import ModelConfig, ModelInstanceGroup, ModelServing
from enginehouse.errors import InvalidArgument
from enginehouse.execution.contract import MemoryEntry
from enginehouse.execution.placement import MODEL_CHOSEN_DEVICE

_CHOSEN = {
    ModelServing.HOST_THREAD: HostKind.THREAD,
    ModelServing.HOST_PROCESS: HostKind.PROCESS,
    ModelServing.HOST_DEVICE: HostKind.DEVICE,
}


@dataclass(frozen=True, slots=True)
class ProcessKey:
    """Which process an instance goes into: placements with equal keys share it. With `shared` other models
    whose keys are equal live there, too; `device` is what the process alone sees (several with commas), "" for
    everything."""

    name: str
    shared: bool = False
    device: str = ""


@dataclass(frozen=True, slots=True)
class HostingPlan:
    """One model's. `key_of` is None for threads."""

    kind: HostKind
    key_of: Callable[[Placement], ProcessKey] | None = None


def plan_hosting(config: ModelConfig, backend: Backend, defaults: Mapping[str, HostKind]) -> HostingPlan:
    """For a config with explicit instance groups. The config's `serving.host` decides, then the server's
    default for the backend, then the backend; what runs on a GPU runs in the GPU's process at least.

    Raises InvalidArgument for a host that the model can't live in.
    """
    said = _CHOSEN.get(config.serving.host)
    kind = said or defaults.get(config.backend) or backend.host_kind(config)
    on_gpu = any(group.kind == ModelInstanceGroup.KIND_GPU for group in config.instance_group)
    if kind is HostKind.THREAD:
        if backend.process_per_instance:
            raise InvalidArgument(
                f"model '{config.name}': backend '{config.backend}' runs in processes, not in threads"
            )
        if not on_gpu:
            return HostingPlan(kind)
        if said is HostKind.THREAD:
            raise InvalidArgument(
                f"model '{config.name}': serving.host: thread is for the CPU alone, the server's process uses no GPU"
            )
        kind = HostKind.DEVICE
    if kind is HostKind.DEVICE and not backend.process_per_instance:
        host_name = config.serving.device_host
        return HostingPlan(kind, lambda placement: ProcessKey(host_name, True, placement.device))
    group = backend.host_group(config)
    if group:
        return HostingPlan(HostKind.PROCESS, lambda placement: ProcessKey(group, True, _gpus_of(placement)))
    if backend.process_per_instance:
        return HostingPlan(HostKind.PROCESS, lambda placement: ProcessKey(placement.name))
    return HostingPlan(HostKind.PROCESS, lambda _: ProcessKey(""))


def _gpus_of(placement: Placement) -> str:
    if placement.device in ("cpu", MODEL_CHOSEN_DEVICE):
        return ""
    return ",".join((placement.device, *placement.more_devices))


def memory_entries(
    context_name: str, version: int, needs: MemoryNeeds, placements: Sequence[Placement]
) -> list[MemoryEntry]:
    """What to book: weights and KV once a device, workspace for each instance there."""
    num_by_device: dict[str, int] = {}
    for placement in placements:
        for device in (placement.device, *placement.more_devices):
            num_by_device[device] = num_by_device.get(device, 0) + 1
    return [
        MemoryEntry(context_name, version, device, kind, num_bytes)
        for device, count in num_by_device.items()
        for kind, num_bytes in (
            ("weights", needs.weights_bytes),
            ("workspace", needs.workspace_bytes_per_instance * count),
            ("kv", needs.kv_bytes),
        )
        if num_bytes
    ]


def declared_memory(config: ModelConfig) -> MemoryNeeds | None:
    """What the config's `serving.memory` claims; None where it claims nothing.

    kv_bytes alone is no claim but a wish: the backend, which grants it, knows what comes on top.
    """
    memory = config.serving.memory
    if not (memory.weights_bytes or memory.workspace_bytes_per_instance):
        return None
    return MemoryNeeds(memory.weights_bytes, memory.workspace_bytes_per_instance, memory.kv_bytes)


def first_segment_bytes(config: ModelConfig) -> int:
    """Room for two full batches of what the config declares; variable sizes count as one."""
    rows = max(config.max_batch_size, 1)
    largest = 0
    for tensors in (config.input, config.output):
        total = 0
        for tensor in tensors:
            elements = 1
            for dim in tensor.dims:
                elements *= max(dim, 1)
            total += elements * _ITEM_BYTES.get(tensor.data_type, 8)
        largest = max(largest, total)
    return min(2 * rows * largest, MAX_FIRST_SEGMENT_BYTES)


MAX_FIRST_SEGMENT_BYTES = 64 << 20
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 4, 12: 8, 13: 64, 14: 2}
