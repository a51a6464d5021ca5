"""Ensembles: graphs of ordinary core requests, batched with everyone else's.

The scheduler only keeps count; what a request does is in `ensemble_run`, the graph in `ensemble_graph`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from enginehouse.config.schema import ModelConfig
from enginehouse.execution.contract import Batch, InstanceHandle
from enginehouse.scheduling.clock import Clock, LoopClock
from enginehouse.scheduling.contract import ExecutionObserver, Refusal, SubmitRequest
from enginehouse.scheduling.ensemble_check import ConfigLookup, client_dims
from enginehouse.scheduling.ensemble_graph import EnsembleGraph, Step
from enginehouse.scheduling.ensemble_handover import HandsOver
from enginehouse.scheduling.ensemble_run import EnsembleRun
from enginehouse.scheduling.in_flight import InFlight, cancelled, stopped
from enginehouse.scheduling.step_gate import StepGate
from enginehouse.types import InferRequest, InferResponse

ANSWERS_AHEAD = 2
"""Of a decoupled step whose consumers are full: one that waits to be let in and one on its way."""

logger = logging.getLogger("enginehouse.scheduling.ensemble")


class EnsembleScheduler:
    """The contract's Scheduler for ensembles. Steps are bounded by the queues of their models and by the gate."""

    def __init__(
        self,
        config: ModelConfig,
        version: int,
        observer: ExecutionObserver,
        submit: SubmitRequest,
        lookup: ConfigLookup,
        clock: Clock | None = None,
        hands_over: HandsOver | None = None,
    ) -> None:
        self.graph = EnsembleGraph.of(config)
        self.config = config
        self.observer = observer
        self.submit_step = submit
        self.lookup = lookup
        self.hands_over = hands_over
        self.clock = clock or LoopClock()
        if self.graph.max_inflight_requests:
            logger.info(
                "Ensemble model '%s' configured with max_inflight_requests: %s",
                config.name,
                self.graph.max_inflight_requests,
            )
        self.gate = StepGate(self.graph.max_inflight_requests)
        self.is_decoupled = config.model_transaction_policy.decoupled
        self.version = str(version)
        self.output_dims = {tensor.name: client_dims(tensor) for tensor in config.output}
        self._instance = EnsembleInstance(f"{config.name}_{version}")
        self._runs: set[EnsembleRun] = set()
        self._max_ahead: dict[int, int] = {}
        self._is_closed = False
        self._in_flight = InFlight(observer)

    @property
    def num_pending(self) -> int:
        return 0

    @property
    def num_in_flight(self) -> int:
        return self._in_flight.num_requests

    @property
    def num_sequences(self) -> int:
        return 0

    def submit(self, request: InferRequest) -> None:
        if self._is_closed:
            raise stopped(request)
        if request.cancelled:
            raise cancelled()
        request.times.queued_ns = request.times.started_ns = self.clock.now_ns()
        run = EnsembleRun(self, request)
        self._runs.add(run)
        self._in_flight.enter()
        run.start()

    def set_instances(self, instances: Sequence[InstanceHandle]) -> None:
        """An ensemble has none."""

    async def drain(self) -> None:
        await self._in_flight.drained()

    def close(self, refusal: Refusal = stopped) -> None:
        self._is_closed = True
        for run in list(self._runs):
            run.fail(refusal(run.request))

    def deliver(self, run: EnsembleRun, response: InferResponse) -> None:
        if response.final:
            self._runs.discard(run)
            run.drop_tensors()
            if response.error is None:
                self.observer.on_batch([run.request], self._instance, run.times(), None)
        self._in_flight.deliver(run.request, response)
        if response.final:
            run.let_go()

    def max_ahead(self, step: Step, member: ModelConfig) -> int:
        """How far the step's model may be ahead of the steps that read its answers; 0 is any number.

        Never where that would make the model wait for itself: where it is a step behind this one as well.
        """
        if not member.model_transaction_policy.decoupled:
            return 0
        ahead = self._max_ahead.get(step.index)
        if ahead is None:
            behind = self.graph.steps_behind(step)
            names = {name for other in behind for name in self._model_names(other.model_name, other.model_version)}
            own = self._model_names(step.model_name, step.model_version)
            ahead = self._max_ahead[step.index] = 0 if own & names else ANSWERS_AHEAD
        return ahead

    def _model_names(self, name: str, version: str) -> set[str]:
        """The model and those that it is made of."""
        names = {name}
        for step in self.lookup(name, version).ensemble_scheduling.step:
            names |= self._model_names(step.model_name, str(step.model_version) if step.model_version >= 0 else "")
        return names


class EnsembleInstance:
    """Stands for the instance that an ensemble doesn't have, where statistics name one."""

    device = "cpu"
    group = 0
    num_slots = 0
    available = True

    def __init__(self, name: str) -> None:
        self.name = name

    def execute(self, batch: Batch) -> None:
        raise AssertionError("bug: ensembles run their steps as requests")

    def cancel(self, request: InferRequest) -> None:
        raise AssertionError("bug: ensembles run their steps as requests")
