"""What models ask of the server (BLS, load, logs, metrics) while they run in a thread of its process.

`submit_for_model` is also what process hosts use when the question comes over the channel.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from enginehouse.errors import EnginehouseError, Internal, error_of
from enginehouse.execution.contract import ServerServices
from enginehouse.execution.running import as_error
from enginehouse.types import InferRequest, InferResponse

T = TypeVar("T")


def submit_for_model(services: ServerServices, request: InferRequest, decoupled: bool) -> None:
    """On the loop. Never raises: refusals come as the request's one answer, as Triton words them."""
    assert request.sink is not None, "a model's request without a sink: a bug of the host"
    name, version = request.model_name, request.model_version
    try:
        if not services.is_model_ready(name, version):
            raise Internal(f"Failed for execute the inference request. Model '{name}' is not ready.")
        if not decoupled and services.is_decoupled(name, version):
            raise Internal(
                f"Model {name} is using the decoupled. The current BLS request call doesn't support models "
                f"using the decoupled transaction policy. Please use 'decoupled=True' argument to the 'exec' "
                f"or 'async_exec' calls for decoupled models.'"
            )
        services.submit(request)
    except EnginehouseError as problem:
        error = error_of(problem.code, f"Model {name} - Error when running inference: {problem}")
        request.sink(InferResponse(error=error, model_name=name, model_version=version, id=request.id))


class LoopServices:
    """backend.Services for models in threads: every question goes to the loop."""

    def __init__(self, services: ServerServices, loop: asyncio.AbstractEventLoop, model: str, version: int) -> None:
        self._services = services
        self._loop = loop
        self._model = model
        self._version = version
        self._answered = threading.Condition()

    def infer(self, request: InferRequest, decoupled: bool = False) -> None:
        sink = request.sink
        assert sink is not None, "infer needs request.sink"

        def answer(response: InferResponse) -> None:
            sink(response)
            with self._answered:
                self._answered.notify_all()

        request.sink = answer
        self._loop.call_soon_threadsafe(submit_for_model, self._services, request, decoupled)

    def load_model(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None:
        self._wait(self._services.load_model(name, config, files))

    def unload_model(self, name: str, unload_dependents: bool) -> None:
        self._wait(self._services.unload_model(name, unload_dependents))

    def is_model_ready(self, name: str, version: str) -> bool:
        return self._ask(lambda: self._services.is_model_ready(name, version))

    def log(self, level: str, message: str, file: str, line: int) -> None:
        self._loop.call_soon_threadsafe(self._services.log, level, message, file, line)

    def metric(self, operation: str, family: str, labels: Mapping[str, str], value: Any) -> Any:
        return self._ask(lambda: self._services.metric(self._model, self._version, operation, family, labels, value))

    def progress(self, done: int, total: int, what: str) -> None:
        self.log("INFO", f"model '{self._model}': {what}: {done} of {total}", __file__, 0)

    def wait_until(self, done: Callable[[], bool], timeout_s: float | None = None) -> bool:
        with self._answered:
            return self._answered.wait_for(done, timeout_s)

    def poll(self) -> None:
        """Nothing to do: the loop takes in answers and cancellations by itself."""

    def listen(self) -> None:
        """Nothing to do."""

    def _ask(self, question: Callable[[], T]) -> T:
        async def answer() -> T:
            return question()

        return self._wait(answer())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except Exception as problem:
            raise as_error(problem) from problem
