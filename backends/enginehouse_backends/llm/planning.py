"""What an LLM will use of a device, decided from its files before anything is loaded. Every refusal tells the numbers.

On CPUs what is free now counts, on GPUs what the ledger has left: the server decides, books it, and hands the KV
memory's size to the process that loads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from enginehouse.backend import DeviceRoom
from enginehouse.errors import InvalidArgument, ResourceExhausted
from enginehouse_backends.llm.architecture import Architecture
from enginehouse_backends.llm.attention import KvShape
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.llm_settings import LlmSettings

logger = logging.getLogger(__name__)

MAX_FOLLOWED_TOKENS = 64
DEFAULT_GPU_UTILIZATION = 0.9
"""Of a GPU, for all that one LLM takes."""
_TYPICAL_TOKENS = 512
"""KV memory that is set aside by default for each sequence that may run on a CPU."""
_SHARE_OF_MEMORY = 0.25
"""Of what is free, for KV memory by default on a CPU."""
CONTEXT_BYTES = 700 << 20
"""Of a process on a GPU: CUDA's context, loaded kernels, the workspaces of cuBLAS."""
_SPARE = 0.03
"""Of what is free on a GPU: stays so, for what allocators lose."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, **_DTYPES}
_ROUNDED_BYTES = {"int4": 0.5 + 4 / 32, "int8": 1 + 4 / 128, "fp8": 1.0}
"""Of a weight that is rounded while it is loaded, its share of the scales included."""
_WHOLE = ("embed_tokens", "lm_head", "norm")
"""What every rank of a tensor-parallel group holds whole."""


@dataclass(frozen=True, slots=True)
class LlmPlan:
    """What an LLM will use. Bytes are those of one rank."""

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
    workspace_bytes: int = 0
    kv_cache_dtype: torch.dtype | None = None
    """None is `dtype`."""
    attention: str = ""
    """Which attention kernels of a GPU; "" measures."""
    num_ranks: int = 1
    pooling: str = ""
    """Of a model that embeds."""

    @property
    def max_wanted(self) -> int:
        if self.pooling:
            return self.max_batched_tokens + self.max_num_seqs
        return self.max_num_seqs + MAX_FOLLOWED_TOKENS


@dataclass(frozen=True, slots=True)
class _Defaults:
    max_num_seqs: int
    max_batched_tokens: int
    block_size: int


_CPU = _Defaults(64, 2048, 32)
_GPU = _Defaults(256, 8192, 16)


def plan_llm(
    name: str,
    settings: LlmSettings,
    architecture: Architecture,
    checkpoint: Checkpoint,
    rooms: Mapping[str, DeviceRoom] | None = None,
) -> LlmPlan:
    """rooms: what there is on each GPU that it will span; none for a CPU.

    Raises InvalidArgument for settings that can't be, ResourceExhausted for what can't fit.
    """
    _check_ranks(name, settings.tensor_parallel_size, architecture)
    if rooms:
        return _plan_on_gpus(name, settings, architecture, checkpoint, rooms)
    return _plan_on_cpu(name, settings, architecture, checkpoint)


def _plan_on_cpu(name: str, settings: LlmSettings, architecture: Architecture, checkpoint: Checkpoint) -> LlmPlan:
    dtype = _choose_dtype(settings, architecture, on_gpu=False)
    if settings.kv_cache_dtype not in ("", "auto"):
        logger.warning("model '%s': kv_cache_dtype is for GPUs; on CPUs keys and values are %s", name, dtype)
    token_bytes = _token_bytes(architecture, dtype, settings.tensor_parallel_size)
    max_num_seqs = settings.max_num_seqs or _CPU.max_num_seqs
    max_tokens = max(settings.max_num_batched_tokens or _CPU.max_batched_tokens, max_num_seqs)
    workspace = _cpu_workspace_bytes(architecture, max_tokens, max_num_seqs, settings.tensor_parallel_size)
    context = _context(name, settings, architecture)
    weights_bytes = _weights_bytes(checkpoint, dtype)
    free = psutil.virtual_memory().available
    if weights_bytes > free:
        raise ResourceExhausted(
            f"model '{name}' has {_gib(weights_bytes)} of weights as {dtype}, and {_gib(free)} of memory are free"
        )
    left = free - weights_bytes - workspace
    kv_bytes = settings.kv_bytes or min(
        max(max_num_seqs * _TYPICAL_TOKENS, context) * token_bytes, max(int(left * _SHARE_OF_MEMORY), 0)
    )
    if kv_bytes > left:
        raise ResourceExhausted(
            f"model '{name}' needs {_gib(weights_bytes)} for weights, {_gib(workspace)} for workspace and "
            f"{_gib(kv_bytes)} for KV, and {_gib(free)} of memory are free"
        )
    return LlmPlan(
        dtype,
        _fitting_context(name, context, kv_bytes, token_bytes, settings),
        max_num_seqs,
        max_tokens,
        kv_bytes,
        weights_bytes,
        max((settings.num_threads or default_num_threads()) // settings.tensor_parallel_size, 1),
        quantization=settings.quantization,
        workspace_bytes=workspace,
        num_ranks=settings.tensor_parallel_size,
        pooling=settings.pooling.kind,
    )


def _plan_on_gpus(
    name: str,
    settings: LlmSettings,
    architecture: Architecture,
    checkpoint: Checkpoint,
    rooms: Mapping[str, DeviceRoom],
) -> LlmPlan:
    dtype, ranks = _choose_dtype(settings, architecture, on_gpu=True), settings.tensor_parallel_size
    kv_dtype = _choose_kv_dtype(settings)
    token_bytes = _token_bytes(architecture, kv_dtype or dtype, ranks)
    max_num_seqs = settings.max_num_seqs or _GPU.max_num_seqs
    max_tokens = max(settings.max_num_batched_tokens or _GPU.max_batched_tokens, max_num_seqs)
    context = _context(name, settings, architecture)
    weights = _weights_bytes_on_gpu(checkpoint, dtype, settings.quantization, ranks)
    device, room = min(rooms.items(), key=lambda item: item[1].free_bytes)
    workspace = _workspace_bytes(architecture, dtype, max_tokens + max_num_seqs, max_num_seqs, ranks)
    workspace += CONTEXT_BYTES if device.startswith("cuda") else 0
    utilization = settings.gpu_memory_utilization or DEFAULT_GPU_UTILIZATION
    allowed = min(int(utilization * room.limit_bytes), int(room.free_bytes * (1 - _SPARE)))
    most = max(max_num_seqs * context, context) * token_bytes
    kv_bytes = settings.kv_bytes or min(allowed - weights - workspace, most)
    needed = f"{_gib(weights)} for weights and {_gib(workspace)} for workspace"
    if kv_bytes < 64 * token_bytes or weights + workspace + kv_bytes > room.free_bytes:
        wanted = f", {_gib(kv_bytes)} for KV" if kv_bytes > 0 else " and has nothing left for KV"
        raise ResourceExhausted(
            f"model '{name}' needs {needed}{wanted} on {device}, and {_gib(room.free_bytes)} of "
            f"{_gib(room.limit_bytes)} are free there, {_gib(allowed)} for this model (gpu_memory_utilization "
            f"{utilization:g})"
        )
    return LlmPlan(
        dtype,
        _fitting_context(name, context, kv_bytes, token_bytes, settings),
        max_num_seqs,
        max_tokens,
        kv_bytes,
        weights,
        1,
        block_size=_gpu_block_size(settings),
        quantization=settings.quantization,
        workspace_bytes=workspace,
        kv_cache_dtype=kv_dtype,
        attention=settings.attention,
        num_ranks=ranks,
        pooling=settings.pooling.kind,
    )


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


def _check_ranks(name: str, ranks: int, architecture: Architecture) -> None:
    a = architecture
    kv_fits = a.num_kv_heads % ranks == 0 or ranks % a.num_kv_heads == 0
    if a.num_heads % ranks or a.intermediate_size % ranks or not kv_fits:
        raise InvalidArgument(
            f"model '{name}': {a.num_heads} heads, {a.num_kv_heads} of them with keys and values, and a width of "
            f"{a.intermediate_size} can't be divided by tensor_parallel_size {ranks}"
        )


def _context(name: str, settings: LlmSettings, architecture: Architecture) -> int:
    if settings.max_model_len > architecture.max_positions:
        raise InvalidArgument(
            f"model '{name}': max_model_len {settings.max_model_len} is more than the {architecture.max_positions} "
            f"positions that config.json gives the model"
        )
    return settings.max_model_len or architecture.max_positions


def _fitting_context(name: str, context: int, kv_bytes: int, token_bytes: int, settings: LlmSettings) -> int:
    """Tokens of the longest sequence that the KV memory holds."""
    held = kv_bytes // token_bytes
    if held >= context:
        return context
    if settings.max_model_len:
        raise ResourceExhausted(
            f"model '{name}': a context of {context} tokens needs {_gib(context * token_bytes)} of KV memory, and "
            f"{_gib(kv_bytes)} are set aside ({held} tokens). Raise serving.memory.kv_bytes or lower max_model_len"
        )
    logger.warning("model '%s': the context is cut from %d to %d tokens of KV memory", name, context, held)
    return held


def _choose_dtype(settings: LlmSettings, architecture: Architecture, on_gpu: bool) -> torch.dtype:
    name = settings.dtype or architecture.dtype
    if name not in _DTYPES:
        raise InvalidArgument(f"dtype '{name}' is none of {', '.join(sorted(_DTYPES))}, auto")
    if name == "float16" and not on_gpu:
        logger.info("float16 is computed as bfloat16 on CPUs")
        return torch.bfloat16
    return _DTYPES[name]


def _choose_kv_dtype(settings: LlmSettings) -> torch.dtype | None:
    name = settings.kv_cache_dtype
    if name in ("", "auto"):
        return None
    if name not in _KV_DTYPES:
        raise InvalidArgument(f"kv_cache_dtype '{name}' is none of {', '.join(sorted(_KV_DTYPES))}, auto")
    return _KV_DTYPES[name]


def _gpu_block_size(settings: LlmSettings) -> int:
    size = settings.block_size or _GPU.block_size
    if size not in (16, 32, 64, 128):
        raise InvalidArgument(f"block_size {size} is none of 16, 32, 64, 128: those that the GPU kernels know")
    return size


def _token_bytes(architecture: Architecture, dtype: torch.dtype, ranks: int) -> int:
    heads = max(architecture.num_kv_heads // ranks, 1)
    return KvShape(architecture.num_layers, heads, architecture.head_dim, 1, dtype).dense_block_bytes


def _weights_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """As they will lie in memory."""
    elements = sum(
        (checkpoint.stored(name).stop - checkpoint.stored(name).start) // checkpoint.stored(name).dtype.itemsize
        for name in checkpoint.names
    )
    return elements * dtype.itemsize


def _weights_bytes_on_gpu(checkpoint: Checkpoint, dtype: torch.dtype, rounding: str, ranks: int) -> int:
    """Of one rank. Codes stay as they are stored; floats become `dtype`, or are rounded."""
    total = 0.0
    for name in checkpoint.names:
        stored = checkpoint.stored(name)
        num_bytes = float(stored.stop - stored.start)
        is_whole = any(part in name for part in _WHOLE)
        if stored.dtype in _DTYPES.values():
            is_rounded = rounding in _ROUNDED_BYTES and len(stored.shape) == 2 and not is_whole
            each = _ROUNDED_BYTES[rounding] if is_rounded else dtype.itemsize
            num_bytes *= each / stored.dtype.itemsize
        total += num_bytes if is_whole else num_bytes / ranks
    return int(total)


def _workspace_bytes(
    architecture: Architecture, dtype: torch.dtype, max_tokens: int, max_num_seqs: int, ranks: int
) -> int:
    """An upper bound of what the largest step and the graphs keep beside weights and KV."""
    a = architecture
    row = _row_values(a, ranks)
    # logits are made in the weights' type and widened; soft-capping and sampling want another copy
    logits = (max_num_seqs + MAX_FOLLOWED_TOKENS) * a.vocab_size * (dtype.itemsize + 8)
    graphs = max_num_seqs * (row * dtype.itemsize + a.vocab_size * (dtype.itemsize + 4))
    splits = 4 * max(max_num_seqs, 512) * a.query_size // ranks * 4
    return max_tokens * row * dtype.itemsize + logits + graphs + splits


def _cpu_workspace_bytes(architecture: Architecture, max_tokens: int, max_num_seqs: int, ranks: int) -> int:
    """An upper bound of what the native program keeps of a step: its values are float32 at most."""
    a = architecture
    logits = (max_num_seqs + MAX_FOLLOWED_TOKENS) * (a.vocab_size + 2 * a.hidden_size)
    return 4 * ((max_tokens + max_num_seqs) * _row_values(a, ranks) + logits)


def _row_values(architecture: Architecture, ranks: int) -> int:
    """Of a token, the most that live at once."""
    a = architecture
    return 4 * a.hidden_size + (2 * a.query_size + 2 * a.kv_size + 3 * a.intermediate_size) // ranks


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
