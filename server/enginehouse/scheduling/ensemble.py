"""Ensembles: graphs of ordinary core requests, batched with everyone else's.

The scheduler only keeps count; what a request does is in `ensemble_run`, the graph in `ensemble_graph`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from enginehouse.config.schema import ModelConfig
from enginehouse.execution.contract import Batch, InstanceHandle
from enginehouse.scheduling.clock import Clock, LoopClock
from enginehouse.scheduling.contract import ExecutionObserver, SubmitRequest
from enginehouse.scheduling.ensemble_check import ConfigLookup, client_dims
from enginehouse.scheduling.ensemble_graph import EnsembleGraph
from enginehouse.scheduling.ensemble_run import EnsembleRun, StepGate
from enginehouse.scheduling.in_flight import InFlight, cancelled, stopped
from enginehouse.types import InferRequest, InferResponse

logger = logging.getLogger("enginehouse.scheduling.ensemble")


class EnsembleScheduler:
    """The contract's Scheduler for ensembles. Steps are bounded by the queues of their models."""

    def __init__(
        self,
        config: ModelConfig,
        version: int,
        observer: ExecutionObserver,
        submit: SubmitRequest,
        lookup: ConfigLookup,
        clock: Clock | None = None,
    ) -> None:
        self.graph = EnsembleGraph.of(config)
        self.config = config
        self.observer = observer
        self.submit_step = submit
        self.lookup = lookup
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

    def close(self) -> None:
        self._is_closed = True
        for run in list(self._runs):
            run.fail(stopped(run.request))

    def deliver(self, run: EnsembleRun, response: InferResponse) -> None:
        if response.final:
            self._runs.discard(run)
            if response.error is None:
                self.observer.on_batch([run.request], self._instance, run.times(), None)
        self._in_flight.deliver(run.request, response)


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
