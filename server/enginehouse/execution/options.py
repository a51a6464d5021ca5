"""What the server's options say about execution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from enginehouse.backend import HostKind
from enginehouse.execution.supervision import SupervisionPolicy
from enginehouse.options import ServerOptions, settings_by_scope


@dataclass(frozen=True, slots=True)
class HostOptions:
    """Everything has a default: tests and embedders set what they need."""

    backend_directories: Sequence[Path] = ()
    cpu_for_missing_gpu: bool = False
    """Run KIND_GPU groups on the CPU where there is no GPU, instead of refusing the model."""
    memory_limits: Mapping[str, int | float] = field(default_factory=dict)
    """By device ("cpu", "cuda:0", …): bytes that models may use, or a fraction; without one, all of it."""
    host_policies: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Settings by policy."""
    min_compute_capability: float = 0.0
    """GPUs below it are not used."""
    gpu_load_limits: Mapping[int, float] = field(default_factory=dict)
    """By GPU: a load onto one that is fuller than this fraction is refused."""
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
            unload_timeout_s=options.host_unload_timeout_secs,
        ),
        host_policies=settings_by_scope(options.host_policy),
        min_compute_capability=options.min_supported_compute_capability,
        gpu_load_limits={limit.device: limit.value for limit in options.model_load_gpu_limit},
        backend_settings=options.backend_options,
        default_hosts=defaults,
        simulated_gpu_bytes=options.simulated_device,
    )
