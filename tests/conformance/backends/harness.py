"""Loads a model through the plug-in contract and runs it, whatever kind of instance it has. No server."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format

from enginehouse.backend import Backend, Instance, LoadContext, Model, Placement, RequestInstance, TensorInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.types import DataType, InferRequest, InferResponse, Tensor

ANSWER_TIMEOUT_S = 30
DEVICE = os.environ.get("ENGINEHOUSE_TEST_DEVICE", "cpu")
"""Where models are placed: with cuda:0 the same tests are those of a GPU."""


@dataclass(slots=True)
class Loaded:
    context: LoadContext
    model: Model
    instances: list[Instance] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        return self.context.config

    def close(self) -> None:
        for instance in self.instances:
            instance.close()
        self.instances.clear()
        self.model.close()


def context_of(backend: Backend, folder: Path, text: str) -> LoadContext:
    config: ModelConfig = text_format.Parse(text, ModelConfig())
    config.name = config.name or "model"
    config.backend = backend.name
    config.instance_group.add(count=1, kind="KIND_CPU" if DEVICE == "cpu" else "KIND_GPU")
    context = LoadContext(config, 1, folder)
    return LoadContext(backend.complete_config(context), 1, folder)


def load(backend: Backend, folder: Path, text: str, num_instances: int = 1) -> Loaded:
    context = context_of(backend, folder, text)
    loaded = Loaded(context, backend.load(context))
    for number in range(num_instances):
        loaded.instances.append(loaded.model.create_instance(Placement(f"model_{number}", DEVICE)))
    return loaded


def run(instance: Instance, inputs: Mapping[str, Tensor], outputs: Sequence[str] = ()) -> dict[str, Tensor]:
    """Raises what the model answers."""
    if isinstance(instance, TensorInstance):
        return dict(instance.run(inputs, outputs))
    assert isinstance(instance, RequestInstance)
    return _run_as_request(instance, inputs, outputs)


def _run_as_request(
    instance: RequestInstance, inputs: Mapping[str, Tensor], outputs: Sequence[str]
) -> dict[str, Tensor]:
    answered = threading.Event()
    answers: list[InferResponse] = []

    def sink(response: InferResponse) -> None:
        answers.append(response)
        if response.final:
            answered.set()

    request = InferRequest("model", inputs=dict(inputs), requested_outputs=outputs, sink=sink)
    request.batch_size = max((tensor.shape[0] for tensor in inputs.values() if tensor.shape), default=0)
    instance.execute([request])
    assert answered.wait(ANSWER_TIMEOUT_S), "the model gave no final answer"
    response = answers[0]
    if response.error is not None:
        raise response.error
    return {tensor.name: tensor for tensor in response.outputs}


def tensor(name: str, array: Any, datatype: DataType) -> Tensor:
    """Over memory of its own that nobody may write to, as a request's body is."""
    view = Tensor.from_numpy(name, array, datatype)
    return Tensor(name, datatype, view.shape, memoryview(bytes(view.host_data())))


def concatenated(results: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Rows of several runs, one after the other, by output."""
    return {name: np.concatenate([result[name].numpy() for result in results]) for name in results[0]}
