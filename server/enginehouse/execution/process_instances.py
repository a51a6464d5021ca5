"""Instances and engines in workers, as schedulers and the core see them; they outlive the workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from enginehouse.backend import Placement
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError, FailureReason, Unavailable
from enginehouse.execution import messages as m
from enginehouse.execution.answering import WorkerBatch
from enginehouse.execution.contract import Batch
from enginehouse.execution.generations import Generations
from enginehouse.execution.open_calls import NoAnswer
from enginehouse.execution.patience import ends_in_time
from enginehouse.execution.process import WorkerProcess
from enginehouse.execution.running import as_error
from enginehouse.types import GenerateRequest, InferRequest, MetricFamily, TokenEvent

if TYPE_CHECKING:
    from enginehouse.execution.process_model import ProcessHostedModel

QUICK_BATCH_NS = 1_000_000
"""Below it the way between two batches is worth hiding: the next one waits in the worker already."""
_SMOOTHING = 0.1
READY_PATIENCE_S = 1.0


class ProcessInstance:
    """An InstanceHandle over an instance in a worker; outlives the workers that it lives in."""

    def __init__(self, model: ProcessHostedModel, placement: Placement) -> None:
        self.name = placement.name
        self.device = placement.device
        self.group = placement.group
        self.placement = placement
        self.model = model
        self.worker: WorkerProcess | None = None
        self.instance_id = 0
        self.slot = 0
        self.kind = ""
        self.idle = asyncio.Event()
        self.idle.set()
        self._is_retiring = False
        self._running: set[WorkerBatch] = set()
        self._asking: asyncio.Future[None] | None = None
        self._last_word = True
        self._may_stage = stages_batches(model.config)
        self._batch_ns = float(QUICK_BATCH_NS)

    @property
    def num_slots(self) -> int:
        """Two while batches are quick, so that one waits in the worker for the other's end."""
        return 2 if self._may_stage and self._batch_ns < QUICK_BATCH_NS else 1

    @property
    def available(self) -> bool:
        return self.worker is not None and self.worker.alive and not self._is_retiring

    async def retire(self) -> bool:
        """Takes no further batches; returns when it has finished those it has. False if it doesn't."""
        self._is_retiring = True
        return await ends_in_time(self.idle.wait(), self.model.progress.look, self.model.policy.unload_timeout_s)

    async def says_ready(self) -> bool:
        """The model's own word, which it gives between batches; its last one while a batch takes long."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask_ready())
        await asyncio.wait([self._asking], timeout=READY_PATIENCE_S)
        return self.available and self._last_word

    async def _ask_ready(self) -> None:
        """One question at a time: a model that hangs doesn't read those that would pile up."""
        assert self.worker is not None, "asked of an instance without a worker: a bug"
        try:
            self._last_word = bool(await self.worker.call(partial(_probe, self.instance_id)))
        except NoAnswer:
            return  # it ended; what starts after it has not said anything yet
        except EnginehouseError:
            self._last_word = False

    def execute(self, batch: Batch) -> None:
        model = self.model
        running = WorkerBatch(
            batch,
            model.name,
            model.version_text,
            model.joiner,
            self.instance_id,
            self.slot,
            self.kind == "tensors",
            self._on_finished,
            model.progress,
        )
        self._running.add(running)
        self.idle.clear()
        if self.worker is None or not self.worker.alive:
            error = Unavailable(f"instance '{self.name}' is not running", reason=FailureReason.BACKEND)
            asyncio.get_running_loop().call_soon(running.fail, error)
            return
        try:
            self.worker.execute(running)
        except Exception as problem:  # requests that can't be joined
            self.worker.batches.pop(running.batch_id, None)
            asyncio.get_running_loop().call_soon(running.fail, as_error(problem))

    def cancel(self, request: InferRequest) -> None:
        for running in self._running:
            index = running.index_of(request)
            if index is not None and self.worker is not None:
                self.worker.cancel(running, index)
                return

    def _on_finished(self, running: WorkerBatch) -> None:
        self._batch_ns += _SMOOTHING * (running.busy_ns - self._batch_ns)
        self._running.discard(running)
        if not self._running:
            self.idle.set()


def stages_batches(config: ModelConfig) -> bool:
    """Only where nobody waits for a batch to fill, a sequence to go on, or a resource to come free."""
    if config.HasField("dynamic_batching") or config.HasField("sequence_batching"):
        return False
    return not any(group.HasField("rate_limiter") for group in config.instance_group)


class ProcessGenerative:
    """A GenerativeHandle over an engine in a worker."""

    def __init__(self, instance: ProcessInstance) -> None:
        self._instance = instance
        self.generations = Generations()

    def submit(self, request: GenerateRequest, emit: Callable[[TokenEvent], None]) -> None:
        worker = self._instance.worker
        if worker is None or not worker.alive:
            raise Unavailable(f"the engine of model '{self._instance.model.name}' is not running")
        self.generations.open(request.id, emit)
        try:
            worker.channel.send(m.Generate(self._instance.instance_id, request))
        except BaseException:  # no message can hold it: an integer of more than 64 bits
            self.generations.forget(request.id)
            raise

    def cancel(self, request_id: str) -> None:
        if self._instance.worker is not None and request_id in self.generations:
            self._instance.worker.channel.send(m.CancelGenerate(self._instance.instance_id, request_id))

    async def metrics(self) -> Sequence[MetricFamily]:
        worker = self._instance.worker
        if worker is None or not worker.alive:
            return ()
        values = await worker.call(partial(_engine_metrics, self._instance.instance_id), 5.0)
        return msgspec.convert(values, list[MetricFamily])

    def on_refused(self, request_id: str, error: EnginehouseError) -> None:
        self.generations.on_events([TokenEvent(request_id, error=error)])

    def fail_all(self, reason: str) -> None:
        self.generations.fail_all(Unavailable(reason, reason=FailureReason.BACKEND))


def _probe(instance_id: int, call_id: int) -> m.Probe:
    return m.Probe(call_id, instance_id)


def _engine_metrics(instance_id: int, call_id: int) -> m.EngineMetrics:
    return m.EngineMetrics(call_id, instance_id)
