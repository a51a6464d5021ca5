"""LLMs as a backend: a Hugging Face folder, or Triton's model.json, becomes a model that generates.

All LLMs of one engine group live in one process, and share its engine and KV memory.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from enginehouse.backend import (
    Backend,
    DeviceRoom,
    GenerativeInstance,
    HostKind,
    Instance,
    LoadContext,
    MemoryNeeds,
    Model,
    Placement,
)
from enginehouse.config.schema import ModelConfig, ModelInput, ModelInstanceGroup, ModelOutput
from enginehouse.errors import EnginehouseError, Internal, InvalidArgument, NotFound
from enginehouse.types import (
    DataType,
    FinishReason,
    GenerateRequest,
    GenerateTask,
    MetricFamily,
    SamplingParameters,
    TokenEvent,
)
from enginehouse_backends.llm.answering import Answer
from enginehouse_backends.llm.architecture import Architecture, read_architecture
from enginehouse_backends.llm.attention import PLACE_BYTES
from enginehouse_backends.llm.block_pool import BlockPool
from enginehouse_backends.llm.chat import ChatTemplate
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.checkpoints import open_checkpoint
from enginehouse_backends.llm.engine import Engine
from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.llm_settings import DEFAULT_GROUP, LlmSettings, read_settings
from enginehouse_backends.llm.metrics import LlmMetrics
from enginehouse_backends.llm.planning import CONTEXT_BYTES, LlmPlan, plan_llm
from enginehouse_backends.llm.pooling import MEAN
from enginehouse_backends.llm.preparing import Preparer, PromptLimits
from enginehouse_backends.llm.ranks import Order, ParallelRunner, Ranks, load_on_ranks
from enginehouse_backends.llm.runner import Runner
from enginehouse_backends.llm.runners import is_gpu, make_arena, make_runner, make_runtime
from enginehouse_backends.llm.scheduler import Scheduler, SchedulerLimits
from enginehouse_backends.llm.served_llm import ServedLlm
from enginehouse_backends.llm.step_building import BlockTable
from enginehouse_backends.llm.tokenizer import Tokenizer
from enginehouse_backends.llm.waiting_queue import tenant_weights

logger = logging.getLogger(__name__)

DEFAULT_MAX_WAITING = 4096
_SHORT_TEXT = 2048
"""Characters: so much is tokenized at once, longer text by a thread of its own."""
_LONGEST_CPU_STEP_S = 0.5
_TORCH_TOKENS = 512
"""Of a step on a CPU without the kernels: attention over more of them takes gigabytes for some models."""

_INPUTS = (
    ("text_input", DataType.BYTES, 1, False),
    ("stream", DataType.BOOL, 1, True),
    ("sampling_parameters", DataType.BYTES, 1, True),
    ("exclude_input_in_output", DataType.BOOL, 1, True),
    ("return_finish_reason", DataType.BOOL, 1, True),
    ("return_cumulative_logprob", DataType.BOOL, 1, True),
    ("return_logprobs", DataType.BOOL, 1, True),
    ("return_num_input_tokens", DataType.BOOL, 1, True),
    ("return_num_output_tokens", DataType.BOOL, 1, True),
    ("return_token_ids", DataType.BOOL, 1, True),
)
_OUTPUTS = (
    ("text_output", DataType.BYTES, -1),
    ("finish_reason", DataType.BYTES, -1),
    ("cumulative_logprob", DataType.FP32, -1),
    ("logprobs", DataType.BYTES, -1),
    ("num_input_tokens", DataType.UINT32, 1),
    ("num_output_tokens", DataType.UINT32, -1),
    ("token_ids", DataType.BYTES, -1),
)


class LlmBackend(Backend):
    """See module."""

    name = "llm"

    def host_kind(self, config: ModelConfig) -> HostKind:
        return HostKind.PROCESS

    def host_group(self, config: ModelConfig) -> str:
        return config.serving.llm.engine_group or DEFAULT_GROUP

    def complete_config(self, context: LoadContext) -> ModelConfig:
        settings = read_settings(context)
        if any(group.kind == ModelInstanceGroup.KIND_MODEL for group in context.config.instance_group):
            raise InvalidArgument(f"model '{context.name}': an LLM is placed by KIND_CPU or KIND_GPU, not KIND_MODEL")
        config = ModelConfig.FromString(context.config.SerializeToString())
        config.max_batch_size = 0
        config.model_transaction_policy.decoupled = True
        if settings.tensor_parallel_size > 1:
            config.serving.llm.tensor_parallel_size = settings.tensor_parallel_size
        given = {tensor.name for tensor in config.input} | {tensor.name for tensor in config.output}
        for name, datatype, dim, optional in _INPUTS:
            if name not in given:
                config.input.append(ModelInput(name=name, data_type=datatype.proto, dims=[dim], optional=optional))
        for name, datatype, dim in _OUTPUTS:
            if name not in given:
                config.output.append(ModelOutput(name=name, data_type=datatype.proto, dims=[dim]))
        return config

    def memory_needs(self, context: LoadContext) -> MemoryNeeds:
        settings = read_settings(context)
        checkpoint = open_checkpoint(settings)
        rooms = {device: room for device, room in context.rooms.items() if is_gpu(device)}
        plan = plan_llm(context.name, settings, read_architecture(settings.folder), checkpoint, rooms)
        return MemoryNeeds(plan.weights_bytes, plan.workspace_bytes, plan.kv_bytes)

    def load(self, context: LoadContext) -> Model:
        return LlmModel(context)


class LlmModel(Model):
    """One version of an LLM. The weights come with the instance, which knows its device."""

    def __init__(self, context: LoadContext) -> None:
        self._context = context
        self._settings = read_settings(context)
        self._architecture = read_architecture(self._settings.folder)
        self._tokenizer = _load_tokenizer(self._settings)
        self._instance: LlmInstance | None = None
        open_checkpoint(self._settings).close()  # what is broken is told before memory is asked for

    def create_instance(self, placement: Placement) -> Instance:
        if self._instance is not None:
            raise InvalidArgument(
                f"model '{self._context.name}': one instance serves all requests of an LLM; remove 'count' from "
                f"instance_group"
            )
        self._instance = LlmInstance(self._context, self._settings, self._architecture, self._tokenizer, placement)
        return self._instance


class LlmInstance(GenerativeInstance):
    """An LLM in its group's engine. `submit` and `cancel` may come from any thread."""

    def __init__(
        self,
        context: LoadContext,
        settings: LlmSettings,
        architecture: Architecture,
        tokenizer: Tokenizer | None,
        placement: Placement,
    ) -> None:
        self._name = context.name
        self._tokenizer, self._pooling = tokenizer, settings.pooling
        self._eos = frozenset(_eos_token_ids(architecture, tokenizer))
        chat = None if tokenizer is None else ChatTemplate(tokenizer, settings.tokenizer_folder, settings.chat_template)
        devices = _devices_of_ranks(placement, settings.tensor_parallel_size)
        self._group = _GROUPS.enter(f"{settings.engine_group} {' '.join(devices)}", devices)
        try:
            plan, self._runner = self._load(context, settings, architecture, placement)
        except BaseException:
            _GROUPS.leave(self._group)
            raise
        limits = PromptLimits(architecture.vocab_size, plan.max_model_len, self._eos)
        self._preparer = Preparer(context.name, limits, tokenizer, chat)
        self._emit: Callable[[Sequence[TokenEvent]], None] = lambda events: None
        try:
            # a version that is loaded again joins while its elder still serves
            key = f"{context.name}:{context.version}#{next(_NUMBERS)}"
            self.llm = _serve(key, context.name, settings, plan, self._runner, self)
            self.llm.scheduler.waiting.weights = tenant_weights(context.config)
            num_pages = -(-plan.kv_bytes // self._group.engine.arena.page_bytes)
            self._group.engine.join(self.llm, num_pages, settings.share_weight)
        except BaseException:
            self._runner.close()
            _GROUPS.leave(self._group)
            raise
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._lock = threading.Lock()
        self._preparing: dict[str, bool] = {}
        """Ids that are being tokenized, and whether they are still wanted. Guarded by the lock."""
        logger.info("model '%s' serves contexts of %d tokens", context.name, plan.max_model_len)

    def _load(
        self, context: LoadContext, settings: LlmSettings, architecture: Architecture, placement: Placement
    ) -> tuple[LlmPlan, Runner]:
        runtime = self._group.runtime
        rooms = None
        if runtime is not None:
            free = runtime.free_bytes() + CONTEXT_BYTES  # which the plan counts, and which is there by now
            rooms = {placement.device: DeviceRoom(free, free)}
        checkpoint = open_checkpoint(settings, None if runtime is None else runtime.device)
        try:
            plan = plan_llm(context.name, settings, architecture, checkpoint, rooms)
            progress = _Progress(context, checkpoint.num_bytes())
            return plan, self._load_ranks(settings, architecture, checkpoint, plan, progress)
        finally:
            checkpoint.close()

    def _load_ranks(
        self,
        settings: LlmSettings,
        architecture: Architecture,
        checkpoint: Checkpoint,
        plan: LlmPlan,
        progress: _Progress,
    ) -> Runner:
        """All ranks at once, where there are several."""
        runtime, ranks = self._group.runtime, self._group.ranks
        if ranks is None:
            return make_runner(runtime, architecture, checkpoint, plan, progress.add)
        key = f"{self._name}#{next(_NUMBERS)}"
        others = load_on_ranks(ranks, key, settings, plan)
        runner: Runner | None = None
        try:
            runner = make_runner(runtime, architecture, checkpoint, plan, progress.add, ranks.group)
            for loaded in others:
                loaded.result()
        except BaseException:
            if runner is not None:
                runner.close()
            ranks.tell(Order("close", key))
            raise
        return ParallelRunner(ranks, key, runner)

    @property
    def engine(self) -> Engine:
        return self._group.engine

    @property
    def is_on_gpu(self) -> bool:
        return self._group.runtime is not None

    def start(self, emit: Callable[[Sequence[TokenEvent]], None]) -> None:
        self._emit = emit

    def emit(self, events: Sequence[TokenEvent]) -> None:
        self._emit(events)

    def submit(self, request: GenerateRequest) -> None:
        arrived_ns = time.monotonic_ns()
        if _is_quick(request):
            self._enter(request, arrived_ns)
            return
        with self._lock:
            if len(self._preparing) >= self.llm.max_waiting:
                raise self.llm.full_queue()
            self._preparing[request.id] = True
        self._threads.submit(self._enter_later, request, arrived_ns)

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._preparing:
                self._preparing[request_id] = False
        self.engine.cancel(self.llm, request_id)

    def metrics(self) -> Sequence[MetricFamily]:
        self.llm.refresh_gauges()
        return self.llm.metrics.families()

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        self._group.engine.leave(self.llm)
        self._runner.close()
        _GROUPS.leave(self._group)

    def _enter_later(self, request: GenerateRequest, arrived_ns: int) -> None:
        try:
            self._enter(request, arrived_ns)
        except EnginehouseError as error:
            self._emit([TokenEvent(request.id, finish_reason=FinishReason.ERROR, error=error)])
        except Exception as error:
            logger.exception("preparing a request failed")
            wrapped = Internal(f"preparing the prompt failed: {error!r}")
            self._emit([TokenEvent(request.id, finish_reason=FinishReason.ERROR, error=wrapped)])
        finally:
            with self._lock:
                wanted = self._preparing.pop(request.id)
            if not wanted:  # the cancellation came before the engine knew the id
                self.engine.cancel(self.llm, request.id)

    def _enter(self, request: GenerateRequest, arrived_ns: int) -> None:
        embeds = bool(self._pooling.kind)
        if request.task in (GenerateTask.TOKENIZE, GenerateTask.DETOKENIZE):
            event = self._preparer.answer_text_task(request)
            event.finish_reason = FinishReason.STOP
            self._emit([event])
            return
        if embeds is not (request.task is GenerateTask.EMBED):
            does = "makes embeddings and generates no text" if embeds else "generates text and makes no embeddings"
            raise InvalidArgument(f"model '{self._name}' {does}")
        if embeds:
            request.sampling = SamplingParameters(temperature=0.0, max_tokens=1, detokenize=False)
        generation = self._preparer.prepare(request, self.llm.most_tokens)
        generation.arrived_ns = arrived_ns
        self.engine.submit(self.llm, self._answer(generation, request))

    def _answer(self, generation: Generation, request: GenerateRequest) -> Answer:
        text = self._preparer.prompt_text(request) if request.return_prompt else None
        pooling = self._pooling if self._pooling.kind else None
        return Answer(generation, self._tokenizer, self._eos, request.stream, request.return_prompt, text, pooling)


def _is_quick(request: GenerateRequest) -> bool:
    """Whether its prompt is ready, or made ready in less time than a thread takes to wake."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return len(prompt) <= _SHORT_TEXT
    return isinstance(prompt, Sequence)


def _serve(
    key: str, name: str, settings: LlmSettings, plan: LlmPlan, runner: Runner, instance: LlmInstance
) -> ServedLlm:
    arena, space = instance.engine.arena, instance.engine.space
    most_tokens = plan.max_batched_tokens
    if not (settings.max_num_batched_tokens or instance.is_on_gpu or runner.is_native):
        most_tokens = min(most_tokens, max(_TORCH_TOKENS, plan.max_num_seqs))
    limits = SchedulerLimits(
        block_size=runner.block_size,
        max_running=plan.max_num_seqs,
        max_batched_tokens=most_tokens,
        target_itl_s=settings.target_itl_ms / 1000,
        longest_step_s=0.0 if instance.is_on_gpu else _LONGEST_CPU_STEP_S,
        # a mean needs the rows of all tokens
        prefix_caching=settings.enable_prefix_caching and settings.pooling.kind != MEAN,
    )
    per_page = arena.blocks_per_page(runner.block_bytes)
    max_blocks = -(-plan.max_model_len // runner.block_size)
    table = BlockTable(
        plan.max_num_seqs, max_blocks, arena.page_bytes // PLACE_BYTES, runner.block_bytes // PLACE_BYTES, per_page
    )
    scheduler = Scheduler(key, BlockPool(per_page), space, limits, table.follow)
    num_blocks, on_gpu = plan.kv_bytes // runner.block_bytes, instance.is_on_gpu
    cache_config = {
        "block_size": str(runner.block_size),
        "cache_dtype": str(plan.kv_cache_dtype or plan.dtype).removeprefix("torch."),
        "enable_prefix_caching": str(settings.enable_prefix_caching),
        "num_gpu_blocks": str(num_blocks if on_gpu else 0),
        "num_cpu_blocks": str(0 if on_gpu else num_blocks),
    }
    metrics = LlmMetrics(name, plan.max_model_len, cache_config)
    max_waiting = settings.max_waiting or DEFAULT_MAX_WAITING
    return ServedLlm(key, scheduler, runner, table, metrics, instance.emit, max_waiting)


class _Group:
    def __init__(self, key: str, devices: Sequence[str]) -> None:
        self.key = key
        self.runtime = make_runtime(devices[0])
        self.ranks = Ranks(devices) if len(devices) > 1 else None
        self.engine = Engine(make_arena(self.runtime))
        self.num_members = 0


class _Groups:
    """Engines of this process by group and device. The last member stops its engine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: dict[str, _Group] = {}

    def enter(self, key: str, devices: Sequence[str]) -> _Group:
        """devices: of the engine's ranks."""
        with self._lock:
            group = self._groups.get(key) or _Group(key, devices)
            self._groups[key] = group
            group.num_members += 1
            return group

    def leave(self, group: _Group) -> None:
        with self._lock:
            group.num_members -= 1
            if group.num_members == 0:
                del self._groups[group.key]
                group.engine.stop()
                if group.ranks is not None:
                    group.ranks.close()


_GROUPS = _Groups()
_NUMBERS = itertools.count()


class _Progress:
    """Tells the server how many bytes of weights are loaded."""

    def __init__(self, context: LoadContext, total: int) -> None:
        services = context.services
        self._tell = None if services is None else partial(services.progress, total=total, what="weights")
        self._done = self._told = 0
        self._step = max(total // 100, 1)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._tell is not None and self._done - self._told >= self._step:
            self._told = self._done
            self._tell(self._done)


def _devices_of_ranks(placement: Placement, num_ranks: int) -> Sequence[str]:
    """On a CPU all ranks share it."""
    if placement.more_devices or num_ranks == 1:
        return (placement.device, *placement.more_devices)
    return (placement.device,) * num_ranks


def _load_tokenizer(settings: LlmSettings) -> Tokenizer | None:
    try:
        return Tokenizer(settings.tokenizer_folder)
    except NotFound as error:
        logger.warning("%s: prompts must be token ids", error)
        return None


def _eos_token_ids(architecture: Architecture, tokenizer: Tokenizer | None) -> Sequence[int]:
    """Those of generation_config.json and config.json, and the tokenizer's own."""
    ids = list(architecture.eos_token_ids)
    if tokenizer is not None:
        token = tokenizer.special_token("eos_token")
        own = tokenizer.token_id(token) if token else None
        if own is not None:
            ids.append(own)
    return ids
