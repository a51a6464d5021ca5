"""Which instances a config asks for and on which device each runs. Pure.

Names and error texts are Triton's: group `<model>_<index>` (or `<model>` where the config has no group),
instance `<group>_<index>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from enginehouse.backend import Placement
from enginehouse.config.backends import implementation_of
from enginehouse.config.schema import ModelConfig, ModelInstanceGroup
from enginehouse.errors import InvalidArgument

KIND_AUTO = ModelInstanceGroup.KIND_AUTO
KIND_GPU = ModelInstanceGroup.KIND_GPU
KIND_CPU = ModelInstanceGroup.KIND_CPU
KIND_MODEL = ModelInstanceGroup.KIND_MODEL

LLM_BACKEND = "llm"
MODEL_CHOSEN_DEVICE = "model"
"""Placement.device for KIND_MODEL: the backend picks."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What placement may use: GPU names by their number, and whether a GPU group may fall back to the CPU."""

    gpus: Sequence[str] = ()
    cpu_for_missing_gpu: bool = False
    cores_by_policy: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """CPU cores by host policy; groups that name none have the policies "cpu", "gpu_<id>" and "model"."""
    free_by_gpu: Mapping[str, int] = field(default_factory=dict)
    """Bytes; where they are known, an instance that spans GPUs and names none gets the emptiest."""


def with_explicit_groups(config: ModelConfig, machine: Machine, gpu_capable: bool = True) -> ModelConfig:
    """A copy whose instance groups have name, count, a kind other than AUTO, and GPUs.

    Idempotent. Raises InvalidArgument for a group that can't be placed on this machine.
    """
    explicit = ModelConfig()
    explicit.CopyFrom(config)
    if not explicit.instance_group:
        explicit.instance_group.add(name=config.name, count=1, kind=KIND_AUTO)
    for index, group in enumerate(explicit.instance_group):
        group.name = group.name or f"{config.name}_{index}"
        group.count = max(group.count, 1)
        _fix_kind(group, config, machine, gpu_capable)
    return explicit


def num_spanned(config: ModelConfig) -> int:
    """GPUs that one instance of an LLM spans; 0 for models that get an instance on each GPU of their group."""
    spanned = int(config.serving.llm.tensor_parallel_size)
    return max(spanned, 1) if implementation_of(config.backend) == LLM_BACKEND else spanned


def _fix_kind(group: ModelInstanceGroup, config: ModelConfig, machine: Machine, gpu_capable: bool) -> None:
    what = f"instance group {group.name} of model {config.name}"
    if group.kind == KIND_AUTO:
        group.kind = KIND_GPU if group.gpus or (machine.gpus and gpu_capable) else KIND_CPU
    if group.kind in (KIND_CPU, KIND_MODEL) and group.gpus and group.kind == KIND_CPU:
        raise InvalidArgument(f"{what} has kind KIND_CPU but specifies one or more GPUs")
    if group.kind != KIND_GPU:
        return
    if not machine.gpus:
        if machine.cpu_for_missing_gpu:
            group.kind = KIND_CPU
            del group.gpus[:]
            return
        raise InvalidArgument(f"{what} has kind KIND_GPU but no GPUs are available")
    if num_spanned(config):
        _choose_spanned(group, what, num_spanned(config), machine)
    elif not group.gpus:
        group.gpus.extend(range(len(machine.gpus)))
    for gpu in group.gpus:
        if not 0 <= gpu < len(machine.gpus):
            known = ", ".join(str(number) for number in range(len(machine.gpus)))
            raise InvalidArgument(
                f"{what} specifies invalid or unsupported gpu id {gpu}. GPUs on this machine: {known}"
            )


def _choose_spanned(group: ModelInstanceGroup, what: str, count: int, machine: Machine) -> None:
    """Leaves the choice open where nobody knows how full the GPUs are."""
    if count > len(machine.gpus) or (group.gpus and len(group.gpus) != count):
        have = f"lists {len(group.gpus)}" if group.gpus else f"can have {len(machine.gpus)}"
        raise InvalidArgument(f"{what} {have} GPUs, and tensor_parallel_size asks for {count}")
    if not group.gpus and machine.free_by_gpu:
        free = [machine.free_by_gpu.get(name, 0) for name in machine.gpus]
        emptiest = sorted(range(len(free)), key=lambda gpu: -free[gpu])
        group.gpus.extend(sorted(emptiest[:count]))


def placements(config: ModelConfig, machine: Machine) -> list[Placement]:
    """The instances of a config with explicit groups, in its order; GPU groups count for each GPU, unless each
    instance spans them."""
    placed: list[Placement] = []
    for number, group in enumerate(config.instance_group):
        devices = _devices(group, machine)
        others: tuple[str, ...] = ()
        if group.kind == KIND_GPU and num_spanned(config):
            spanned = devices or machine.gpus[: num_spanned(config)]
            devices, others = spanned[:1], tuple(spanned[1:])
        for index in range(group.count * len(devices)):
            device = devices[index // group.count]
            cores = machine.cores_by_policy.get(group.host_policy or _default_policy(device, machine), ())
            placed.append(Placement(f"{group.name}_{index}", device, number, group.passive, cores, others))
    return placed


def _default_policy(device: str, machine: Machine) -> str:
    return f"gpu_{machine.gpus.index(device)}" if device in machine.gpus else device


def _devices(group: ModelInstanceGroup, machine: Machine) -> Sequence[str]:
    if group.kind == KIND_GPU:
        return [machine.gpus[gpu] for gpu in group.gpus]
    return [MODEL_CHOSEN_DEVICE] if group.kind == KIND_MODEL else ["cpu"]
