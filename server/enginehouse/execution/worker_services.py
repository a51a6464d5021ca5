"""backend.Services in a worker: what a model asks goes to the server as messages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from enginehouse.errors import EnginehouseError
from enginehouse.execution import messages as m
from enginehouse.execution.refs import request_ref, response_of, tensors_bytes, write_tensors
from enginehouse.execution.worker_channel import WorkerChannel
from enginehouse.types import InferRequest, InferResponse


class WorkerCalls:
    """Calls from this worker to the server that wait for answers; shared by the models in it."""

    def __init__(self, channel: WorkerChannel) -> None:
        self.channel = channel
        self._ids = itertools.count(1)
        self._answers: dict[int, m.Answer | None] = {}
        self._inferences: dict[int, InferRequest] = {}

    def ask(self, model_id: int, method: str, *arguments: Any) -> Any:
        """The answer's value. Raises the answer's error."""
        call_id = next(self._ids)
        self._answers[call_id] = None
        self.channel.send(m.Service(call_id, model_id, method, list(arguments)))
        self.channel.wait_until(lambda: self._answers[call_id] is not None)
        answer = self._answers.pop(call_id)
        assert answer is not None, "waited for it"
        if answer.error is not None:
            raise answer.error.error()
        return answer.value

    def tell(self, model_id: int, method: str, *arguments: Any) -> None:
        self.channel.send(m.Service(0, model_id, method, list(arguments)))

    def infer(self, model_id: int, request: InferRequest, decoupled: bool, parent: tuple[int, int]) -> None:
        assert request.sink is not None, "infer needs request.sink"
        try:
            block, memory = self.channel.allocate(tensors_bytes(request.inputs.values()))
        except EnginehouseError as error:
            request.sink(InferResponse(error=error))
            return
        refs, _ = write_tensors(request.inputs.values(), memory)
        call_id = next(self._ids)
        self._inferences[call_id] = request
        request.on_cancel = lambda _: self.channel.send(m.CancelInfer(call_id))
        freed = self.channel.incoming.take_released()
        self.channel.send(
            m.Infer(call_id, model_id, block, memory.nbytes, request_ref(request, refs), decoupled, *parent, freed)
        )

    def on_answer(self, answer: m.Answer) -> None:
        if answer.call_id in self._answers:
            self._answers[answer.call_id] = answer

    def on_infer_answer(self, message: m.InferAnswer) -> None:
        memory = self.channel.incoming.open(message.block, message.block_nbytes)
        request = self._inferences.get(message.call_id)
        if request is None:
            return
        if message.response.final:
            del self._inferences[message.call_id]
        assert request.sink is not None, "checked when it was sent"
        request.sink(response_of(message.response, memory, request.id))


class ChannelServices:
    """One model's Services. `parent_of` finds the batch and place of a request that the model runs."""

    def __init__(self, calls: WorkerCalls, model_id: int, name: str) -> None:
        self._calls = calls
        self._model_id = model_id
        self._name = name

    def infer(self, request: InferRequest, decoupled: bool = False) -> None:
        parent = request.flow if isinstance(request.flow, tuple) else (0, 0)
        self._calls.infer(self._model_id, request, decoupled, parent)

    def load_model(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None:
        self._calls.ask(self._model_id, "load_model", name, config, dict(files))

    def unload_model(self, name: str, unload_dependents: bool) -> None:
        self._calls.ask(self._model_id, "unload_model", name, unload_dependents)

    def is_model_ready(self, name: str, version: str) -> bool:
        return bool(self._calls.ask(self._model_id, "is_model_ready", name, version))

    def log(self, level: str, message: str, file: str, line: int) -> None:
        self._calls.tell(self._model_id, "log", level, message, file, line)

    def metric(self, operation: str, family: str, labels: Mapping[str, str], value: Any) -> Any:
        return self._calls.ask(self._model_id, "metric", operation, family, dict(labels), value)

    def progress(self, done: int, total: int, what: str) -> None:
        self.log("INFO", f"model '{self._name}': {what}: {done} of {total}", __file__, 0)

    def wait_until(self, done: Callable[[], bool], timeout_s: float | None = None) -> bool:
        return self._calls.channel.wait_until(done, timeout_s)

    def poll(self) -> None:
        self._calls.channel.poll()

    def listen(self) -> None:
        self._calls.channel.read_in_thread()
