"""Makes the runner of a device: which numbers it gets, and whether weights and KV memory fit.

Every refusal tells the numbers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from enginehouse.errors import InvalidArgument, ResourceExhausted, Unsupported
from enginehouse_backends.llm.architecture import Architecture
from enginehouse_backends.llm.arena import Arena, reserve_host_arena
from enginehouse_backends.llm.attention import KvShape
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.llm_settings import LlmSettings
from enginehouse_backends.llm.runner import Runner
from enginehouse_backends.llm.runner_cpu import CpuRunner, CpuRunnerSettings

logger = logging.getLogger(__name__)

DEFAULT_MAX_NUM_SEQS = 64
DEFAULT_MAX_BATCHED_TOKENS = 512
MAX_FOLLOWED_TOKENS = 64
_TYPICAL_TOKENS = 512
"""KV memory that is set aside by default for each sequence that may run."""
_SHARE_OF_MEMORY = 0.25
"""Of what is free, for KV memory by default."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LlmPlan:
    """What an LLM will use. Decided before anything is loaded."""

    dtype: torch.dtype
    max_model_len: int
    max_num_seqs: int
    max_batched_tokens: int
    kv_bytes: int
    weights_bytes: int
    num_threads: int
    block_size: int = 32
    quantization: str = ""
    """How to round dense weights; "" serves them, or a quantized checkpoint, as they are."""

    @property
    def max_wanted(self) -> int:
        return self.max_num_seqs + MAX_FOLLOWED_TOKENS


def plan_llm(name: str, settings: LlmSettings, architecture: Architecture, checkpoint: Checkpoint) -> LlmPlan:
    """On a CPU. Raises InvalidArgument for settings that can't be, ResourceExhausted for what can't fit."""
    dtype = _choose_dtype(settings, architecture)
    shape = KvShape(architecture.num_layers, architecture.num_kv_heads, architecture.head_dim, 1, dtype)
    max_num_seqs = settings.max_num_seqs or DEFAULT_MAX_NUM_SEQS
    if settings.max_model_len > architecture.max_positions:
        raise InvalidArgument(
            f"model '{name}': max_model_len {settings.max_model_len} is more than the {architecture.max_positions} "
            f"positions that config.json gives the model"
        )
    context = settings.max_model_len or architecture.max_positions
    weights_bytes = _weights_bytes(checkpoint, dtype)
    free = psutil.virtual_memory().available
    if weights_bytes > free:
        raise ResourceExhausted(
            f"model '{name}' has {_gib(weights_bytes)} of weights as {dtype}, and {_gib(free)} of memory are free"
        )
    token_bytes = shape.dense_block_bytes
    kv_bytes = settings.kv_bytes or min(
        max(max_num_seqs * _TYPICAL_TOKENS, context) * token_bytes, int((free - weights_bytes) * _SHARE_OF_MEMORY)
    )
    if kv_bytes + weights_bytes > free:
        raise ResourceExhausted(
            f"model '{name}' needs {_gib(weights_bytes)} for weights and {_gib(kv_bytes)} for KV, and {_gib(free)} of "
            f"memory are free"
        )
    held = kv_bytes // token_bytes
    if held < context:
        if settings.max_model_len:
            raise ResourceExhausted(
                f"model '{name}': a context of {context} tokens needs {_gib(context * token_bytes)} of KV memory, and "
                f"{_gib(kv_bytes)} are set aside ({held} tokens). Raise serving.memory.kv_bytes or lower max_model_len"
            )
        logger.warning("model '%s': the context is cut from %d to %d tokens of KV memory", name, context, held)
        context = held
    return LlmPlan(
        dtype,
        context,
        max_num_seqs,
        max(settings.max_num_batched_tokens or DEFAULT_MAX_BATCHED_TOKENS, max_num_seqs),
        kv_bytes,
        weights_bytes,
        settings.num_threads or default_num_threads(),
        quantization=settings.quantization,
    )


def make_runner(
    device: str,
    architecture: Architecture,
    checkpoint: Checkpoint,
    plan: LlmPlan,
    on_loaded: Callable[[int], None],
) -> Runner:
    """Loads the weights. Raises Unsupported for a device that there is no runner for."""
    if device != "cpu":
        raise Unsupported(f"LLMs run on the CPU; there is no runner for '{device}'")
    settings = CpuRunnerSettings(
        plan.dtype,
        max_tokens=plan.max_batched_tokens + plan.max_num_seqs,
        max_wanted=plan.max_wanted,
        max_positions=plan.max_model_len,
        block_size=plan.block_size,
        num_threads=plan.num_threads,
        quantization=plan.quantization,
    )
    return CpuRunner(architecture, checkpoint, settings, on_loaded)


def make_arena(device: str) -> Arena:
    """Empty; it grows with each LLM. On a CPU it may grow to all of the memory."""
    assert device == "cpu", "bug: only CPUs have runners"
    return reserve_host_arena(psutil.virtual_memory().total)


def default_num_threads() -> int:
    """As many as this process may use, by affinity and by its control group."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            allowed = min(allowed, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no control groups here
    return allowed


def _choose_dtype(settings: LlmSettings, architecture: Architecture) -> torch.dtype:
    name = settings.dtype or architecture.dtype
    if name not in _DTYPES:
        raise InvalidArgument(f"dtype '{name}' is none of {', '.join(sorted(_DTYPES))}, auto")
    if name == "float16":
        logger.info("float16 is computed as bfloat16 on CPUs")
        return torch.bfloat16
    return _DTYPES[name]


def _weights_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """As they will lie in memory."""
    elements = sum(
        (checkpoint.stored(name).stop - checkpoint.stored(name).start) // checkpoint.stored(name).dtype.itemsize
        for name in checkpoint.names
    )
    return elements * dtype.itemsize


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
