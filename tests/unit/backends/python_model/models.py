"""Runs a model.py written in a test, in this process, behind Services that a test can look into."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format

from enginehouse.backend import LoadContext, Placement, RequestInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.types import Array, InferRequest, InferResponse, Tensor
from enginehouse_backends.python_model import PythonBackend
from enginehouse_backends.python_model.context import RunningModel, running

CONFIG = """
name: "m" backend: "python"
input [{ name: "X" data_type: TYPE_INT32 dims: [ -1 ] }]
output [{ name: "Y" data_type: TYPE_INT32 dims: [ -1 ] }]
"""


class FakeServices:
    """A server of functions: `models` answers BLS, everything else is noted."""

    def __init__(self) -> None:
        self.models: dict[str, Callable[[InferRequest], list[InferResponse]]] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.on_poll: Callable[[], None] = lambda: None

    def infer(self, request: InferRequest, decoupled: bool = False) -> None:
        assert request.sink is not None
        for response in self.models[request.model_name](request):
            request.sink(response)

    def load_model(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None:
        self.asked.append(("load", name, config, dict(files)))

    def unload_model(self, name: str, unload_dependents: bool) -> None:
        self.asked.append(("unload", name, unload_dependents))

    def is_model_ready(self, name: str, version: str) -> bool:
        return name in self.models

    def log(self, level: str, message: str, file: str, line: int) -> None:
        self.asked.append(("log", level, message, file))

    def metric(self, operation: str, family: str, labels: Mapping[str, str], value: Any) -> Any:
        self.asked.append((operation, family, dict(labels), value))
        return 5.0

    def progress(self, done: int, total: int, what: str) -> None:
        self.asked.append(("progress", done, total, what))

    def wait_until(self, done: Callable[[], bool], timeout_s: float | None = None) -> bool:
        assert done(), "nothing more will come: the test would wait for ever"
        return True

    def poll(self) -> None:
        self.on_poll()

    def listen(self) -> None:
        self.asked.append(("listen",))


class ModelUnderTest:
    def __init__(self, folder: Path, source: str, changes: str = "") -> None:
        (folder / "1").mkdir(parents=True, exist_ok=True)
        (folder / "1" / "model.py").write_text(textwrap.dedent(source))
        config = text_format.Merge(changes, text_format.Parse(CONFIG, ModelConfig()))
        self.services = FakeServices()
        self.context = LoadContext(config, 1, folder, self.services)

    def complete(self) -> ModelConfig:
        with own_modules():
            return PythonBackend().complete_config(self.context)

    @contextmanager
    def instance(self) -> Iterator[RequestInstance]:
        with own_modules():
            made = PythonBackend().load(self.context).create_instance(Placement("m_0_0"))
            assert isinstance(made, RequestInstance)
            yield made
            made.close()

    def run(self, *values: list[int], **fields: Any) -> list[list[InferResponse]]:
        """One request a value, in one batch; all their answers."""
        with self.instance() as instance:
            requests = [request_of(np.array(value, np.int32), **fields) for value in values]
            answers = [collect(request) for request in requests]
            instance.execute(requests)
            return answers


def request_of(array: Array, **fields: Any) -> InferRequest:
    return InferRequest("m", inputs={"X": Tensor.from_numpy("X", array)}, **fields)


def collect(request: InferRequest) -> list[InferResponse]:
    answers: list[InferResponse] = []
    request.sink = answers.append
    return answers


@contextmanager
def own_modules() -> Iterator[None]:
    """What a model imports, and what the interface knows of it, is gone afterwards."""
    modules, path = dict(sys.modules), list(sys.path)
    state = {name: getattr(running, name) for name in RunningModel.__slots__}
    try:
        yield
    finally:
        for name in set(sys.modules) - set(modules):
            if name.startswith("1") or name.endswith("python_backend_utils"):
                del sys.modules[name]
        sys.path[:] = path
        for name, value in state.items():
            setattr(running, name, value)
