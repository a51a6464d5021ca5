"""Runs steps on a GPU: one buffer over, one graph replayed, the tokens back, and one wait of the host's.

Steps of decoding alone replay a graph captured for their bucket of batch sizes; steps with prompts run kernel by
kernel. Everything goes through a DeviceRuntime, so that the same code runs, and is tested, without a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from enginehouse_backends.llm.architecture import Architecture
from enginehouse_backends.llm.arena import Arena
from enginehouse_backends.llm.attention import PLACE_BYTES, KvShape
from enginehouse_backends.llm.attention.choosing import (
    REHEARSED_BLOCKS,
    Rehearsal,
    candidates,
    choose,
    describe,
    rehearsed_step,
)
from enginehouse_backends.llm.attention.tiles import (
    num_decode_splits,
    prefill_tiles,
    query_tokens_per_tile,
    rows_per_tile,
)
from enginehouse_backends.llm.attention.triton_backend import DeviceAttention, DeviceStep, layer_caches
from enginehouse_backends.llm.attention.triton_paged import (
    AttentionShape,
    DecodeWorkspace,
    PrefillPlan,
    SequencePlaces,
    decode_block_n,
)
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.cuda_staging import Bucket, CudaRunnerSettings, Staging, exact_sizes
from enginehouse_backends.llm.dense import load_plain
from enginehouse_backends.llm.device_runtime import DeviceRuntime, Event
from enginehouse_backends.llm.device_sampling import SamplingPlan, merge, plan_sampling, token_sources
from enginehouse_backends.llm.kernels.triton_rope import TokenPlaces
from enginehouse_backends.llm.kernels.triton_sampling import SamplingRows, sample
from enginehouse_backends.llm.layers import Build
from enginehouse_backends.llm.models import build_model
from enginehouse_backends.llm.parallel_group import ParallelGroup
from enginehouse_backends.llm.pooling import pool_rows
from enginehouse_backends.llm.quantization.formats import read_kv_scales
from enginehouse_backends.llm.quantization.linears import Place
from enginehouse_backends.llm.quantization.loading import plan_quantization, quantized_loader
from enginehouse_backends.llm.row_operations import TritonRows
from enginehouse_backends.llm.runner import IntArray, Runner, RunningStep, StepInput, StepOutput
from enginehouse_backends.llm.step_layout import (
    PADDING,
    StepLayout,
    StepSizes,
    batch_buckets,
    bucket_for,
    fill_step,
)

logger = logging.getLogger(__name__)

_MAX_UNFINISHED = 2
_REHEARSED_TOKENS = 2048


class CudaRunner(Runner):
    """See module. The arena must be attached before the first step."""

    is_asynchronous = True

    def __init__(
        self,
        architecture: Architecture,
        checkpoint: Checkpoint,
        settings: CudaRunnerSettings,
        runtime: DeviceRuntime,
        group: ParallelGroup | None = None,
        on_loaded: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """Loads the weights. Raises an EnginehouseError for a checkpoint that doesn't fit the architecture."""
        self.max_wanted, self.block_size = settings.max_wanted, settings.block_size
        self._settings, self._runtime, self.pooling = settings, runtime, settings.pooling
        plan = plan_quantization(architecture.raw, settings.quantization)
        self._build = Build(
            architecture,
            quantized_loader(plan, Place.CUDA, load_plain) if plan.is_active else load_plain,
            dtype=settings.dtype,
            device=runtime.device,
            group=group or ParallelGroup(),
            rows=TritonRows(),
            max_positions=settings.max_positions,
            on_loaded=on_loaded,
            pooled=bool(settings.pooling),
            # one copy of a tied table, where it lies as it is and whole
            share_tied=not plan.is_active and (group is None or group.world_size == 1),
        )
        before = runtime.free_bytes()
        self._model = build_model(self._build)
        self._model.load(checkpoint)
        self.weight_bytes = before - runtime.free_bytes() or checkpoint.num_bytes()
        self.workspace_bytes = 0
        self._num_kv_heads = self._build.group.share(architecture.num_kv_heads)[1]
        self._num_heads = self._build.group.share(architecture.num_heads)[1]
        self.kv_shape = KvShape(
            architecture.num_layers,
            self._num_kv_heads,
            architecture.head_dim,
            settings.block_size,
            settings.kv_cache_dtype or settings.dtype,
        )
        self._kv_scales = [(1.0, 1.0)] * architecture.num_layers
        if self.kv_shape.dtype.itemsize == 1:
            self._kv_scales = read_kv_scales(checkpoint, architecture.num_layers)
        self._attention = DeviceAttention()
        self._kernels = candidates(settings.attention, self.kv_shape, settings.dtype)
        self.attention_choice = ""
        """What attends, and why."""
        self._num_steps = 0
        self._tokens_per_tile = query_tokens_per_tile(
            self._num_heads // self._num_kv_heads, rows_per_tile(architecture.head_dim)
        )
        self._batch_sizes = batch_buckets(settings.max_sequences)
        self._buckets: dict[int, Bucket] = {}
        self._arena: Arena | None = None
        self._allocate()

    @property
    def block_bytes(self) -> int:
        return self.kv_shape.padded_block_bytes

    # --- making ready
    def _allocate(self) -> None:
        settings, device = self._settings, self._runtime.device
        largest = StepSizes(
            settings.max_tokens,
            settings.max_sequences,
            settings.max_wanted,
            settings.max_sequences,
            settings.max_tokens + settings.max_sequences,
        )
        num_words = StepLayout.of(largest).num_words
        blocks = -(-settings.max_positions // settings.block_size)
        self._words = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._sampled = torch.zeros(settings.max_wanted, dtype=torch.int32, device=device)
        self._table = torch.zeros((settings.max_sequences, blocks), dtype=torch.int32, device=device)
        self._stagings = [self._make_staging(num_words, blocks) for _ in range(_MAX_UNFINISHED)]
        self._previous_rows: IntArray = np.zeros(0, dtype=np.int32)
        heads, dim = self._num_heads, self.kv_shape.head_dim
        most = max(size * self._num_splits(size) for size in self._batch_sizes)
        self._workspace = DecodeWorkspace.allocate(most, heads, 1, dim, device)

    def _make_staging(self, num_words: int, blocks: int) -> Staging:
        slots = self._settings.max_sequences
        # the rows of the block table that changed, behind their numbers
        table_words = slots * (blocks + 1)
        return Staging(
            self._runtime.pinned(4 * num_words).view(torch.int32),
            self._runtime.pinned(4 * self._settings.max_wanted).view(torch.int32),
            self._runtime.pinned(4 * table_words).view(torch.int32),
        )

    def _num_splits(self, batch_size: int) -> int:
        tiles = -(-self._settings.max_positions // decode_block_n(self.kv_shape.head_dim))
        return num_decode_splits(batch_size, self._num_kv_heads, self._runtime.num_multiprocessors, tiles)

    @torch.inference_mode()
    def attach_arena(self, arena: Arena) -> None:
        """Captures the graphs: they point into this arena."""
        if self._arena is not None and self._arena.memory is arena.memory:
            return
        self._arena = arena
        self._caches = layer_caches(arena.memory, self.kv_shape, self._kv_scales)
        self._runtime.synchronize()  # weights and buffers were filled on another stream
        before = self._runtime.free_bytes()
        self._buckets = {}
        if not self.attention_choice:
            self._choose_attention()
        if self._settings.use_graphs and not self.pooling and self._model.is_capturable:
            # the largest first: the smaller ones reuse its memory
            for size in reversed(self._batch_sizes):
                self._buckets[size] = self._capture(size)
        self.workspace_bytes = max(before - self._runtime.free_bytes(), 0) + self._words.nbytes + self._table.nbytes

    def _choose_attention(self) -> None:
        """Before anything is served: it writes into the block table."""
        chosen, forced = {}, self._settings.attention not in ("", "triton")
        for phase in ("prompts", "decoding"):
            usable = [each for each in self._kernels if phase == "prompts" or each.is_capturable]
            rehearsal = None if len(usable) == 1 else self._rehearse(phase == "prompts")
            if rehearsal is None:
                kernels, chosen[phase] = usable[0], usable[0].name
            else:
                kernels, chosen[phase] = choose(usable, rehearsal, self._runtime, forced)
            setattr(self._attention, phase, kernels)
        self.attention_choice = describe(chosen)
        logger.info("attention on %s: %s", self._runtime.device, self.attention_choice)

    def _rehearse(self, is_prompt: bool) -> Rehearsal:
        """A prompt's step, or one of decoding, over random blocks of its own."""
        settings, shape, device = self._settings, self.kv_shape, self._runtime.device
        longest = min(settings.max_positions, _REHEARSED_TOKENS)
        count = 1 if is_prompt else bucket_for(min(settings.max_sequences, 32), self._batch_sizes) or 1
        tokens = min(longest, settings.max_tokens) if is_prompt else count
        arena = torch.randn(REHEARSED_BLOCKS * self.block_bytes // shape.dtype.itemsize, device=device)
        cache = layer_caches(arena.to(shape.dtype).view(torch.uint8), shape, [(1.0, 1.0)] * shape.num_layers)[0]
        step = rehearsed_step(tokens, count, longest, self._table.shape, self.block_bytes // PLACE_BYTES)
        tiles = self._tiles_of(step)
        layout = StepLayout.of(exact_sizes(step, tiles) if is_prompt else StepSizes.of_decoding(count))
        staging = self._stagings[0]
        fill_step(layout, staging.words.numpy(), step, token_sources(step, self._previous_rows), [], tiles)
        self._send(layout, staging, step)
        query = torch.randn(tokens, self._num_heads * shape.head_dim, device=device).to(settings.dtype)
        self._runtime.synchronize()  # what was made here was made on another stream
        ids = self._view(layout, "tokens")
        last = int(np.diff(step.query_starts).max())

        def make_step() -> DeviceStep:
            self._num_steps += 1
            return self._device_step(layout, ids, last, step, self._num_steps)

        return Rehearsal(query, cache, make_step, AttentionShape(shape.head_dim**-0.5))

    def detach_arena(self) -> None:
        self._runtime.synchronize()
        self._buckets, self._caches, self._arena = {}, [], None

    def _capture(self, batch_size: int) -> Bucket:
        layout = StepLayout.of(StepSizes.of_decoding(batch_size))
        logits: list[torch.Tensor] = []

        def clear() -> None:
            self._words.fill_(PADDING)  # nobody's: the runs for warming up write nothing
            for name in ("tokens", "positions", "table_rows", "wanted_rows", "context_lengths", "query_starts"):
                self._view(layout, name).zero_()

        def work() -> None:
            logits[:] = [self._forward(layout, 1, None)]

        self._runtime.launch(clear)
        graph = self._runtime.capture(work)
        return Bucket(layout, graph, logits)

    # --- steps
    def run(self, step: StepInput) -> StepOutput:
        return self.start(step).finish()

    @torch.inference_mode()
    def start(self, step: StepInput) -> RunningStep:
        assert self._arena is not None, "bug: a step runs before the arena is attached"
        staging = next((staging for staging in self._stagings if staging.is_free), None)
        assert staging is not None, "bug: more steps are started than finished"
        staging.is_free = False
        bucket = self._bucket_of(step)
        tiles = [] if bucket is not None else self._tiles_of(step)
        layout = bucket.layout if bucket is not None else StepLayout.of(exact_sizes(step, tiles))
        sampling = plan_sampling(step)
        sources = token_sources(step, self._previous_rows)
        fill_step(layout, staging.words.numpy(), step, sources, sampling.rows, tiles)
        self._previous_rows = step.sampled_rows
        self._send(layout, staging, step)
        running = _RunningCudaStep(self, step, sampling, staging)
        self._launch_compute(layout, bucket, running)
        running.event = self._runtime.record()
        return running

    def _bucket_of(self, step: StepInput) -> Bucket | None:
        if len(step.tokens) != len(step.slots) or len(step.wanted_rows) > len(step.slots):
            return None
        size = bucket_for(len(step.slots), self._batch_sizes)
        return None if size is None else self._buckets.get(size)

    def _tiles_of(self, step: StepInput) -> list[tuple[int, int]]:
        counts = np.diff(step.query_starts)
        return prefill_tiles(np.where(counts == 1, 0, counts).tolist(), self._tokens_per_tile)

    def _send(self, layout: StepLayout, staging: Staging, step: StepInput) -> None:
        words = layout.num_words
        changed = list(step.changed_slots)
        columns = self._table.shape[1]
        if changed:
            rows = staging.table_rows.numpy()
            rows[: len(changed)] = changed
            rows[len(changed) : len(changed) * (1 + columns)] = step.block_table[changed, :columns].reshape(-1)

        def copy() -> None:
            self._words[:words].copy_(staging.words[:words], non_blocking=True)
            if changed:
                count = len(changed)
                device = staging.table_rows[: count * (1 + columns)].to(self._runtime.device, non_blocking=True)
                self._table.index_copy_(0, device[:count].long(), device[count:].view(count, columns))

        self._runtime.launch(copy)

    def _launch_compute(self, layout: StepLayout, bucket: Bucket | None, running: _RunningCudaStep) -> None:
        if self.pooling:
            self._launch_pooling(layout, running)
            return
        num_wanted, staging = len(running.step.wanted_rows), running.staging
        host_rows = running.sampling.host_rows
        step, longest = running.step, int(np.diff(running.step.query_starts).max())
        if len(host_rows):
            running.host_logits = self._host_logits(staging, len(host_rows))

        @torch.inference_mode()
        def compute() -> None:
            if bucket is not None:
                bucket.graph.replay()
                logits = bucket.logits[0]
            else:
                logits = self._forward(layout, longest, step)
            staging.tokens[:num_wanted].copy_(self._sampled[:num_wanted], non_blocking=True)
            if len(host_rows):
                rows = torch.from_numpy(host_rows).long().to(logits.device, non_blocking=True)
                running.host_logits.copy_(logits.index_select(0, rows), non_blocking=True)

        self._runtime.launch(compute)

    def _launch_pooling(self, layout: StepLayout, running: _RunningCudaStep) -> None:
        step, width = running.step, self._build.architecture.hidden_size
        running.host_logits = self._host_logits(running.staging, len(step.slots), width)
        longest = int(np.diff(step.query_starts).max())

        @torch.inference_mode()
        def compute() -> None:
            rows = pool_rows(self._forward(layout, longest, step), step, self.pooling)
            running.host_logits.copy_(rows, non_blocking=True)

        self._runtime.launch(compute)

    def _host_logits(self, staging: Staging, num_rows: int, width: int = 0) -> torch.Tensor:
        vocab = width or self._build.architecture.vocab_size
        if staging.host_logits is None or staging.host_logits.shape[0] < num_rows:
            memory = self._runtime.pinned(4 * num_rows * vocab)
            staging.host_logits = memory.view(torch.float32).view(num_rows, vocab)
        return staging.host_logits[:num_rows]

    def finish(self, running: _RunningCudaStep) -> StepOutput:
        assert running.event is not None, "bug: a step is finished that was not started"
        running.event.wait()
        if self.pooling:
            running.staging.is_free = True
            return StepOutput([0] * len(running.step.sampled), [], vectors=running.host_logits.numpy().copy())
        chosen = running.staging.tokens[: len(running.step.wanted_rows)].numpy()
        output = merge(running.step, running.sampling, chosen, running.host_logits)
        running.staging.is_free = True
        return output

    # --- on the device
    def _view(self, layout: StepLayout, name: str) -> torch.Tensor:
        first, count = layout.places[name]
        return self._words[first : first + count]

    def _forward(self, layout: StepLayout, longest: int, step: StepInput | None) -> torch.Tensor:
        """Launches the model and the sampling on what the step buffer holds. Gives the logits.

        longest: most tokens that a sequence computes · step: what the host knows of it, None for a graph.
        """
        self._num_steps += 1
        sizes = layout.sizes
        sources = self._view(layout, "token_sources")
        known = self._sampled[sources.clamp(min=0).long()]
        tokens = torch.where(sources >= 0, known, self._view(layout, "tokens"))
        batch = self._device_step(layout, tokens, longest, step, self._num_steps)
        logits = self._model.forward(tokens, batch)
        assert isinstance(logits, torch.Tensor), "bug: a model gave no tensor"
        if sizes.wanted and not self.pooling:
            rows = SamplingRows(
                self._view(layout, "temperatures").view(torch.float32),
                self._view(layout, "top_ks"),
                self._view(layout, "top_ps").view(torch.float32),
                self._view(layout, "min_ps").view(torch.float32),
                self._view(layout, "seeds").view(torch.int64),
            )
            sample(logits, rows, self._sampled)
        return logits

    def _device_step(
        self, layout: StepLayout, tokens: torch.Tensor, longest: int, given: StepInput | None, number: int
    ) -> DeviceStep:
        assert self._arena is not None, "bug: a step runs before the arena is attached"
        sizes = layout.sizes
        starts, _ = layout.places["query_starts"]
        query_starts = self._words[starts : starts + sizes.sequences + 1]
        positions, table_rows = self._view(layout, "positions"), self._view(layout, "table_rows")
        lengths = self._view(layout, "context_lengths")
        prefill = None
        if sizes.tiles:
            prefill = PrefillPlan(self._view(layout, "tiles").view(-1, 2), self._tokens_per_tile)
        return DeviceStep(
            tokens=tokens,
            positions=positions,
            query_starts=query_starts,
            context_lengths=lengths,
            block_places=self._table,
            wanted_rows=self._view(layout, "wanted_rows").long(),
            arena=self._arena.memory,
            kv_shape=self.kv_shape,
            attention=self._attention,
            max_query=longest,
            max_context=self._settings.max_positions,
            token_places=TokenPlaces(positions, self._view(layout, "token_sequences"), table_rows, self._table),
            sequence_places=SequencePlaces(query_starts, lengths, table_rows, self._table),
            decode_sequences=self._view(layout, "decode_sequences"),
            prefill=prefill,
            num_splits=self._num_splits(bucket_for(sizes.decodes, self._batch_sizes) or sizes.decodes),
            workspace=self._workspace,
            caches=self._caches,
            given=given,
            number=number,
        )

    # --- blocks
    def copy_blocks(self, source_places: IntArray, target_places: IntArray) -> None:
        assert self._arena is not None, "bug: blocks are copied before the arena is attached"
        memory, size = self._arena.memory, self.block_bytes
        pairs = list(zip(source_places.tolist(), target_places.tolist(), strict=True))

        def copy() -> None:
            for source, target in pairs:
                start, to = source * PLACE_BYTES, target * PLACE_BYTES
                memory[to : to + size].copy_(memory[start : start + size])

        self._runtime.launch(copy)

    def close(self) -> None:
        self._runtime.synchronize()
        self._buckets.clear()
        for name in ("_model", "_caches", "_words", "_sampled", "_table", "_workspace", "_stagings"):
            if hasattr(self, name):
                delattr(self, name)


class _RunningCudaStep(RunningStep):
    def __init__(self, runner: CudaRunner, step: StepInput, sampling: SamplingPlan, staging: Staging) -> None:
        self._runner, self.step, self.sampling, self.staging = runner, step, sampling, staging
        self.may_overlap = not len(sampling.host_rows) and not runner.pooling
        self.event: Event | None = None
        self.host_logits = torch.empty(0)

    def finish(self) -> StepOutput:
        return self._runner.finish(self)
