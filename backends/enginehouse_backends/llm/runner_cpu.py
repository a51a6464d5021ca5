"""Runs steps on CPUs: in one native call where the kernels could be built and know the model's parts, else
operation by operation in torch.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from enginehouse_backends.llm.architecture import Architecture
from enginehouse_backends.llm.arena import Arena
from enginehouse_backends.llm.attention import PLACE_BYTES, KvShape, StepBatch
from enginehouse_backends.llm.attention.gather import GatherAttention
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.dense import load_dense
from enginehouse_backends.llm.kernels.build import NoKernels
from enginehouse_backends.llm.kernels.library import NativeStep, library
from enginehouse_backends.llm.layers import Build
from enginehouse_backends.llm.models import DecoderModel, build_model
from enginehouse_backends.llm.native_linear import load_native
from enginehouse_backends.llm.native_program import NativeProgram, check_native
from enginehouse_backends.llm.parallel_group import ParallelGroup
from enginehouse_backends.llm.pooling import pool_rows
from enginehouse_backends.llm.program import NotNative
from enginehouse_backends.llm.quantization.linears import Place
from enginehouse_backends.llm.quantization.loading import QuantizationPlan, plan_quantization, quantized_loader
from enginehouse_backends.llm.runner import IntArray, Runner, StepInput, StepOutput
from enginehouse_backends.llm.sampler import sample

logger = logging.getLogger(__name__)

_QUERIES_TOGETHER = 32
"""Prompt tokens whose attention is one piece of work for a thread."""
_ALONE_S = 150e-6
"""Steps that one thread finishes in so short a time are not worth waking others."""


@dataclass(frozen=True, slots=True)
class CpuRunnerSettings:
    dtype: torch.dtype
    max_tokens: int
    """Most rows of a step."""
    max_wanted: int
    max_positions: int
    block_size: int = 32
    num_threads: int = 1
    native: bool = True
    """False leaves the native kernels out, for comparison."""
    quantization: str = ""
    """How to round dense weights (int8, int4); "" leaves them, and serves quantized checkpoints as they are."""
    pooling: str = ""
    """Of a model that embeds; it runs on torch."""


class _Executor(ABC):
    """From a step to the logits of its wanted rows."""

    block_bytes: int
    workspace_bytes: int = 0

    @abstractmethod
    def run(self, step: StepInput, arena: Arena) -> tuple[torch.Tensor, torch.Tensor | None]:
        """([R, vocab] float32, valid until the next call; [R] the index of each row's largest, if known)"""

    def close(self) -> None:
        """Gives buffers back."""
        return


class CpuRunner(Runner):
    """See module. `settings.max_positions` is the longest context."""

    def __init__(
        self,
        architecture: Architecture,
        checkpoint: Checkpoint,
        settings: CpuRunnerSettings,
        on_loaded: Callable[[int], None] = lambda num_bytes: None,
        group: ParallelGroup | None = None,
    ) -> None:
        """Loads the weights. Raises an EnginehouseError for a checkpoint that doesn't fit the architecture."""
        self.max_wanted, self.block_size = settings.max_wanted, settings.block_size
        torch.set_num_threads(settings.num_threads)
        self._executor = _make_executor(architecture, checkpoint, settings, on_loaded, group or ParallelGroup())
        self.pooling = settings.pooling
        self.is_native = isinstance(self._executor, _NativeExecutor)
        self.weight_bytes = checkpoint.num_bytes()
        self.workspace_bytes = self._executor.workspace_bytes
        self._arena: Arena | None = None

    @property
    def block_bytes(self) -> int:
        return self._executor.block_bytes

    def attach_arena(self, arena: Arena) -> None:
        self._arena = arena

    @torch.inference_mode()
    def run(self, step: StepInput) -> StepOutput:
        assert self._arena is not None, "bug: a step runs before the arena is attached"
        logits, greedy = self._executor.run(step, self._arena)
        if self.pooling:
            return StepOutput([0] * len(step.sampled), [], vectors=pool_rows(logits, step, self.pooling).numpy())
        return sample(logits, greedy, step)

    def copy_blocks(self, source_places: IntArray, target_places: IntArray) -> None:
        assert self._arena is not None, "bug: blocks are copied before the arena is attached"
        memory, size = self._arena.memory, self.block_bytes
        for source, target in zip(source_places.tolist(), target_places.tolist(), strict=True):
            start, to = source * PLACE_BYTES, target * PLACE_BYTES
            memory[to : to + size] = memory[start : start + size]

    def close(self) -> None:
        self._executor.close()
        del self._executor


def _make_executor(
    architecture: Architecture,
    checkpoint: Checkpoint,
    settings: CpuRunnerSettings,
    on_loaded: Callable[[int], None],
    group: ParallelGroup,
) -> _Executor:
    plan = plan_quantization(architecture.raw, settings.quantization)
    build = Build(
        architecture,
        quantized_loader(plan, Place.TORCH, load_dense) if plan.is_active else load_dense,
        dtype=settings.dtype,
        group=group,
        pooled=bool(settings.pooling),
        max_positions=settings.max_positions,
        on_loaded=on_loaded,
    )
    if settings.native and group.world_size == 1 and not settings.pooling:
        try:
            return _NativeExecutor(build, checkpoint, settings, plan)
        except NoKernels as error:
            logger.warning("%s", error)
        except NotNative as error:
            logger.warning("%s runs on torch: the CPU kernels have no %s", architecture.family, error)
    return _TorchExecutor(build, checkpoint, settings)


def _load(build: Build, checkpoint: Checkpoint) -> DecoderModel:
    model = build_model(build)
    model.load(checkpoint)
    return model


class _NativeExecutor(_Executor):
    """One native call a step."""

    def __init__(
        self, build: Build, checkpoint: Checkpoint, settings: CpuRunnerSettings, plan: QuantizationPlan
    ) -> None:
        """Raises NoKernels, or NotNative before any weight is read."""
        kernels = library()
        if settings.block_size != kernels.block_size:
            raise NotNative(f"blocks of {settings.block_size} tokens (only of {kernels.block_size})")
        build = Build(
            build.architecture,
            quantized_loader(plan, Place.NATIVE, load_native) if plan.is_active else load_native,
            dtype=build.dtype,
            max_positions=build.max_positions,
            on_loaded=build.on_loaded,
            # a rounded head is no table to look tokens up in
            share_tied=not plan.rounding,
        )
        check_native(build_model(build), build.dtype)
        kernels.start(settings.num_threads)
        model = _load(build, checkpoint)
        self._program = NativeProgram(model, build.dtype, settings.max_tokens, settings.max_wanted)
        self._num_threads = settings.num_threads
        self._logits = torch.from_numpy(self._program.logits)
        self._greedy = torch.from_numpy(self._program.greedy)
        self.block_bytes = _kv_shape(build, settings).padded_block_bytes
        self.workspace_bytes = self._program.num_bytes

    def run(self, step: StepInput, arena: Arena) -> tuple[torch.Tensor, torch.Tensor | None]:
        num_tokens, num_wanted = len(step.tokens), len(step.wanted_rows)
        num_sequences = len(step.query_starts) - 1
        if num_tokens == num_sequences:
            token_sequences, items = step.query_starts, _single_items(step)
        else:
            counts = np.diff(step.query_starts)
            token_sequences = np.repeat(np.arange(num_sequences, dtype=np.int32), counts)
            items = _attention_items(step, counts)
        native = NativeStep(
            tokens=step.tokens.ctypes.data,
            positions=step.positions.ctypes.data,
            token_sequences=token_sequences.ctypes.data,
            query_starts=step.query_starts.ctypes.data,
            slots=step.slots.ctypes.data,
            block_table=step.block_table.ctypes.data,
            table_stride=step.block_table.shape[1],
            arena=arena.memory.data_ptr(),
            wanted_rows=step.wanted_rows.ctypes.data,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            num_wanted=num_wanted,
            items=items.ctypes.data,
            num_items=len(items),
        )
        self._program.run(native, self._threads_for(num_tokens, num_wanted))
        return self._logits[:num_wanted], self._greedy[:num_wanted]

    def _threads_for(self, num_tokens: int, num_wanted: int) -> int:
        alone_s = self._program.seconds_alone(num_tokens, num_wanted)
        return 1 if alone_s < _ALONE_S else self._num_threads

    def close(self) -> None:
        del self._logits, self._greedy
        self._program.close()


def _single_items(step: StepInput) -> IntArray:
    """As `_attention_items`, where each sequence has one token."""
    items = np.ones((len(step.tokens), 3), dtype=np.int32)
    items[:, 0] = items[:, 1] = np.argsort(-step.context_lengths)
    return items


def _attention_items(step: StepInput, counts: IntArray) -> IntArray:
    """[items, 3] sequence, first row, queries: the longest first, so that threads end together."""
    items = []
    for sequence in np.argsort(-counts * step.context_lengths).tolist():
        first, count = int(step.query_starts[sequence]), int(counts[sequence])
        for start in range(0, count, _QUERIES_TOGETHER):
            items.append((sequence, first + start, min(_QUERIES_TOGETHER, count - start)))
    return np.array(items, dtype=np.int32)


class _TorchExecutor(_Executor):
    """Operation by operation, with the gathering attention."""

    def __init__(self, build: Build, checkpoint: Checkpoint, settings: CpuRunnerSettings) -> None:
        self._model = _load(build, checkpoint)
        self._attention = GatherAttention()
        self._shape = _kv_shape(build, settings)
        self.block_bytes = self._attention.block_bytes(self._shape)

    def run(self, step: StepInput, arena: Arena) -> tuple[torch.Tensor, torch.Tensor | None]:
        most = -(-int(step.context_lengths.max()) // self._shape.block_size)
        batch = StepBatch(
            tokens=torch.from_numpy(step.tokens),
            positions=torch.from_numpy(step.positions),
            query_starts=torch.from_numpy(step.query_starts),
            context_lengths=torch.from_numpy(step.context_lengths),
            block_places=torch.from_numpy(step.block_table[step.slots, :most]),
            wanted_rows=torch.from_numpy(step.wanted_rows).long(),
            arena=arena.memory,
            kv_shape=self._shape,
            attention=self._attention,
            max_query=int(np.diff(step.query_starts).max()),
            max_context=int(step.context_lengths.max()),
        )
        logits = self._model.forward(batch.tokens, batch)
        assert isinstance(logits, torch.Tensor)
        return logits, None

    def close(self) -> None:
        del self._model


def _kv_shape(build: Build, settings: CpuRunnerSettings) -> KvShape:
    a = build.architecture
    num_kv_heads = build.group.share(a.num_kv_heads)[1]
    return KvShape(a.num_layers, num_kv_heads, a.head_dim, settings.block_size, build.dtype)
