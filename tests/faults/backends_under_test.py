"""Backends that misbehave on request; loaded by name into worker processes."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from enginehouse.backend import (
    Backend,
    GenerativeInstance,
    HostKind,
    Instance,
    LoadContext,
    Model,
    Placement,
    RequestInstance,
    TensorInstance,
)
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.types import (
    FinishReason,
    GenerateRequest,
    InferRequest,
    InferResponse,
    MetricFamily,
    Tensor,
    TokenEvent,
)


def misbehave(how: int) -> None:
    """X[0]: what to do. Positive numbers are fine."""
    if how == -1:
        raise InvalidArgument("told to fail")
    if how == -2:
        ctypes.string_at(0)
    if how == -3:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == -4:
        time.sleep(1000)
    if how == -5:
        os._exit(3)
    if how == -6:
        hog = []
        while True:
            hog.append(np.ones(1 << 22, np.uint8))
            time.sleep(0.001)


class Doubling(TensorInstance):
    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Mapping[str, Tensor]:
        values = inputs["X"].numpy()
        misbehave(int(values.reshape(-1)[0]))
        if values.reshape(-1)[0] == 1000:
            self.kept = inputs["X"]
        if values.reshape(-1)[0] == 1001 and self.kept is not None:
            values = self.kept.numpy()
        return {"Y": Tensor.from_numpy("Y", values * 2), "PID": pid_tensor(len(values))}


class Answering(RequestInstance):
    polls_for_cancellation = False

    def execute(self, requests: Sequence[InferRequest]) -> None:
        for request in requests:
            values = request.inputs["X"].numpy()
            misbehave(int(values.reshape(-1)[0]))
            assert request.sink is not None
            while values.reshape(-1)[0] == 77 and not request.cancelled:
                time.sleep(0.01)
            request.sink(InferResponse([Tensor.from_numpy("Y", values * 2), pid_tensor(len(values))]))


class Complaining(Doubling):
    def close(self) -> None:
        raise RuntimeError("not yet")


def pid_tensor(rows: int) -> Tensor:
    return Tensor.from_numpy("PID", np.full((rows, 1), os.getpid(), np.int32))


class Counting(GenerativeInstance):
    """Says the numbers up to max_tokens, one a step. Prompts that are a misbehaviour do it."""

    def __init__(self) -> None:
        self.emit: Callable[[Sequence[TokenEvent]], None] = lambda events: None
        self.running: dict[str, int] = {}
        self.lock = threading.Lock()

    def start(self, emit: Callable[[Sequence[TokenEvent]], None]) -> None:
        self.emit = emit
        threading.Thread(target=self._step_for_ever, daemon=True).start()

    def submit(self, request: GenerateRequest) -> None:
        if request.prompt == "refuse":
            raise InvalidArgument("won't do")
        if request.prompt == "crash":
            misbehave(-2)
        with self.lock:
            self.running[request.id] = request.sampling.max_tokens or 1

    def cancel(self, request_id: str) -> None:
        with self.lock:
            if self.running.pop(request_id, None) is not None:
                self.emit([TokenEvent(request_id, finish_reason=FinishReason.ABORT)])

    def metrics(self) -> Sequence[MetricFamily]:
        return [MetricFamily("steps", "counter", "Steps.", [("", {"a": "b"}, 5.0)])]

    def _step_for_ever(self) -> None:
        while True:
            time.sleep(0.005)
            with self.lock:
                events = []
                for request_id, left in list(self.running.items()):
                    done = FinishReason.LENGTH if left == 1 else None
                    events.append(TokenEvent(request_id, str(left), [left], finish_reason=done))
                    self.running[request_id] = left - 1
                    if done:
                        del self.running[request_id]
                if events:
                    self.emit(events)


class _Model(Model):
    def __init__(self, instance: type[Instance]) -> None:
        self.instance = instance

    def create_instance(self, placement: Placement) -> Instance:
        if placement.name.endswith("_13"):
            raise InvalidArgument("unlucky instance")
        if placement.name.endswith("_14"):
            return Complaining()
        return self.instance()


class TensorsBackend(Backend):
    name = "tensors"

    def load(self, context: LoadContext) -> Model:
        if context.parameter("die_in_load"):
            os._exit(7)
        time.sleep(float(context.parameter("load_s") or 0))
        return _Model(Doubling)


class GenerativeBackend(Backend):
    name = "generative"

    def host_kind(self, config: ModelConfig) -> HostKind:
        return HostKind.PROCESS

    def host_group(self, config: ModelConfig) -> str:
        return "engines"

    def load(self, context: LoadContext) -> Model:
        return _Model(Counting)


class RequestsBackend(Backend):
    name = "requests"
    process_per_instance = True

    def load(self, context: LoadContext) -> Model:
        return _Model(Answering)
