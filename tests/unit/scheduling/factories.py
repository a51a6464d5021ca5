"""What the scheduling tests are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf import text_format

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError
from enginehouse.execution.contract import ExecutionTimes, InstanceHandle
from enginehouse.execution.joiners import joiner_of
from enginehouse.scheduling.build import build_scheduler
from enginehouse.scheduling.contract import Scheduler
from enginehouse.testing.clock import ManualClock
from enginehouse.testing.instances import Function, GatedInstance
from enginehouse.types import CorrelationId, InferRequest, InferResponse, Tensor


def config_of(text: str) -> ModelConfig:
    """A config from pbtxt."""
    config = ModelConfig()
    text_format.Parse(text, config)
    return config


def batching_config(batching: str = "", max_batch_size: int = 4, dims: str = "1") -> ModelConfig:
    """A model with input X and output X, dynamic batching as given."""
    return config_of(
        f"""name: "m" max_batch_size: {max_batch_size}
        input {{ name: "X" data_type: TYPE_INT32 dims: [{dims}] }}
        output {{ name: "X" data_type: TYPE_INT32 dims: [{dims}] }}
        dynamic_batching {{ {batching} }}"""
    )


class Observer:
    """Remembers what the scheduler reports."""

    def __init__(self) -> None:
        self.batches: list[list[InferRequest]] = []
        self.null_rows: list[int] = []
        self.responses: list[InferResponse] = []
        self.hits: list[InferRequest] = []
        self.misses: list[InferRequest] = []

    def on_batch(
        self,
        requests: Sequence[InferRequest],
        instance: InstanceHandle | None,
        times: ExecutionTimes,
        error: EnginehouseError | None,
        num_null_rows: int = 0,
    ) -> None:
        self.batches.append(list(requests))
        self.null_rows.append(num_null_rows)

    def on_cache_hit(self, request: InferRequest, lookup_ns: int) -> None:
        self.hits.append(request)

    def on_cache_miss(self, request: InferRequest, lookup_ns: int, insert_ns: int) -> None:
        self.misses.append(request)

    def on_response(self, request: InferRequest, response: InferResponse) -> None:
        self.responses.append(response)


@dataclass
class Answers:
    """A sink."""

    request: InferRequest
    responses: list[InferResponse] = field(default_factory=list)

    def __call__(self, response: InferResponse) -> None:
        assert not (self.responses and self.responses[-1].final), "an answer after the final one"
        self.responses.append(response)

    @property
    def is_final(self) -> bool:
        return bool(self.responses) and self.responses[-1].final

    @property
    def error(self) -> str:
        """The text of the final error, or ""."""
        return str(self.responses[-1].error or "") if self.responses else ""

    def values(self, output: str = "X") -> list[list[object]]:
        """The output's values, one list for each response that has it."""
        return [
            tensor.numpy().reshape(-1).tolist()
            for response in self.responses
            for tensor in response.outputs
            if tensor.name == output
        ]


@dataclass
class Rig:
    """A scheduler on a manual clock over gated instances."""

    scheduler: Scheduler
    clock: ManualClock
    instances: list[GatedInstance]
    observer: Observer

    def send(self, *values: int, **fields: Any) -> Answers:
        """Submits a request whose X holds these values, one row each."""
        return self.submit(request_of(np.array([[value] for value in values], np.int32), **fields))

    def submit(self, request: InferRequest) -> Answers:
        answers = Answers(request)
        request.sink = answers
        self.scheduler.submit(request)
        return answers

    @property
    def instance(self) -> GatedInstance:
        return self.instances[0]

    @property
    def waiting_sizes(self) -> list[int]:
        """Requests in each batch that an instance holds now."""
        return [len(batch.requests) for instance in self.instances for batch in instance.waiting]

    def run_all(self) -> None:
        """Lets everything run that can run without time passing."""
        self.clock.run_soon()
        while any(instance.waiting for instance in self.instances):
            for instance in self.instances:
                if instance.waiting:
                    instance.step()
            self.clock.run_soon()


def rig_of(config: ModelConfig, num_instances: int = 1, function: Function = dict, **services: Any) -> Rig:
    clock = ManualClock()
    observer = Observer()
    joiner = joiner_of(config)
    instances = [GatedInstance(function, clock.now_ns, f"m_{index}", joiner=joiner) for index in range(num_instances)]
    scheduler = build_scheduler(
        config,
        1,
        instances,
        observer,
        _no_core,
        clock=clock,
        **services,
    )
    return Rig(scheduler, clock, instances, observer)


def _no_core(request: InferRequest) -> None:
    raise AssertionError("this model asks no other")


def request_of(
    array: np.ndarray[tuple[int, ...], np.dtype[np.int32]],
    *,
    correlation_id: CorrelationId = 0,
    start: bool = False,
    end: bool = False,
    batching: bool = True,
    **fields: Any,
) -> InferRequest:
    """A request with one input X. `batching` says whether its first axis is the batch."""
    request = InferRequest(
        "m", inputs={"X": Tensor.from_numpy("X", array)}, batch_size=array.shape[0] if batching else 0
    )
    request.correlation_id = correlation_id
    request.sequence_start, request.sequence_end = start, end
    for name, value in fields.items():
        setattr(request, name, value)
    return request
