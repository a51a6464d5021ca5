"""Makes what a device needs to run LLMs: the runner with its weights, the arena, the device's runtime."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import psutil

from enginehouse.errors import ResourceExhausted, Unsupported
from enginehouse_backends.llm.architecture import Architecture
from enginehouse_backends.llm.arena import Arena, DeviceArena, reserve_host_arena
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.device_runtime import DeviceRuntime, make_cuda_runtime, make_simulated_runtime
from enginehouse_backends.llm.parallel_group import ParallelGroup
from enginehouse_backends.llm.planning import LlmPlan
from enginehouse_backends.llm.runner import Runner
from enginehouse_backends.llm.runner_cpu import CpuRunner, CpuRunnerSettings

SIMULATED = "simulated"


def is_gpu(device: str) -> bool:
    return device.startswith(("cuda", SIMULATED))


def make_runtime(device: str) -> DeviceRuntime | None:
    """One for all LLMs of a device in this process: they share its stream. None for a CPU.

    Raises Unsupported where the device, or what its kernels need, isn't there.
    """
    if device == "cpu":
        return None
    if importlib.util.find_spec("triton") is None:
        raise Unsupported(f"LLMs on '{device}' need Triton's language: `pip install triton`")
    if device.startswith(SIMULATED):
        if importlib.util.find_spec("ml_dtypes") is None:
            raise Unsupported("a simulated GPU runs kernels through Triton's interpreter: `pip install ml_dtypes`")
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' modules are imported
        from enginehouse_backends.llm.kernels.interpreting import install

        install()
        return make_simulated_runtime()
    if device.startswith("cuda"):
        return make_cuda_runtime(device)
    raise Unsupported(f"LLMs run on CPUs and on NVIDIA GPUs; there is no runner for '{device}'")


def make_runner(
    runtime: DeviceRuntime | None,
    architecture: Architecture,
    checkpoint: Checkpoint,
    plan: LlmPlan,
    on_loaded: Callable[[int], None],
    group: ParallelGroup | None = None,
) -> Runner:
    """Loads the weights."""
    if runtime is not None:
        return _make_cuda_runner(runtime, architecture, checkpoint, plan, on_loaded, group)
    settings = CpuRunnerSettings(
        plan.dtype,
        max_tokens=plan.max_batched_tokens + plan.max_num_seqs,
        max_wanted=plan.max_wanted,
        max_positions=plan.max_model_len,
        block_size=plan.block_size,
        num_threads=plan.num_threads,
        quantization=plan.quantization,
        pooling=plan.pooling,
    )
    return CpuRunner(architecture, checkpoint, settings, on_loaded, group)


def _make_cuda_runner(
    runtime: DeviceRuntime,
    architecture: Architecture,
    checkpoint: Checkpoint,
    plan: LlmPlan,
    on_loaded: Callable[[int], None],
    group: ParallelGroup | None,
) -> Runner:
    from enginehouse_backends.llm.cuda_staging import CudaRunnerSettings
    from enginehouse_backends.llm.runner_cuda import CudaRunner

    free = runtime.free_bytes()
    needed = plan.weights_bytes + plan.kv_bytes
    if needed > free:
        raise ResourceExhausted(
            f"{plan.weights_bytes / (1 << 30):.2f} GiB of weights and {plan.kv_bytes / (1 << 30):.2f} GiB of KV don't "
            f"fit on {runtime.device}: its driver says that {free / (1 << 30):.2f} GiB are free"
        )
    settings = CudaRunnerSettings(
        plan.dtype,
        max_tokens=plan.max_batched_tokens + plan.max_num_seqs,
        max_sequences=plan.max_num_seqs,
        max_wanted=plan.max_wanted,
        max_positions=plan.max_model_len,
        block_size=plan.block_size,
        quantization=plan.quantization,
        kv_cache_dtype=plan.kv_cache_dtype,
        pooling=plan.pooling,
        attention=plan.attention,
    )
    return CudaRunner(architecture, checkpoint, settings, runtime, group, on_loaded)


def make_arena(runtime: DeviceRuntime | None) -> Arena:
    """Empty; it grows with each LLM. On a CPU it may grow to all of the memory."""
    if runtime is None:
        return reserve_host_arena(psutil.virtual_memory().total)
    return DeviceArena(runtime.allocate, runtime.release)
