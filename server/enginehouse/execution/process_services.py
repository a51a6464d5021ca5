"""What models in workers ask of the server: answers the messages with `contract.ServerServices`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

from enginehouse.errors import EnginehouseError, Unavailable, Unsupported
from enginehouse.execution import messages as m
from enginehouse.execution.contract import ServerServices
from enginehouse.execution.process import WorkerProcess
from enginehouse.execution.refs import request_of, response_ref, tensors_bytes, write_tensors
from enginehouse.execution.running import as_error
from enginehouse.execution.services import submit_for_model
from enginehouse.types import InferRequest, InferResponse

_logger = logging.getLogger("enginehouse.model")
_LOG_LEVELS = {
    "INFO": logging.INFO,
    "WARNING": logging.WARNING,
    "ERROR": logging.ERROR,
    "VERBOSE": logging.DEBUG,
}


class ServiceDesk:
    """One per server; on the loop."""

    def __init__(self, services: ServerServices | None) -> None:
        self.services = services
        self._inferences: dict[tuple[WorkerProcess, int], InferRequest] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, worker: WorkerProcess, message: Any, model: str, version: int) -> None:
        match message:
            case m.Infer():
                self._infer(worker, message)
            case m.CancelInfer():
                request = self._inferences.get((worker, message.call_id))
                if request is not None:
                    request.cancel()
            case m.Service():
                self._serve(worker, message, model, version)

    def forget(self, worker: WorkerProcess) -> None:
        """The worker has ended: nobody wants its answers."""
        for key in [key for key in self._inferences if key[0] is worker]:
            self._inferences.pop(key).cancel()

    # --- inferences

    def _infer(self, worker: WorkerProcess, message: m.Infer) -> None:
        memory = worker.incoming.open(message.block, message.block_nbytes)
        request = request_of(message.request, memory)
        request.trace = None
        running = worker.batches.get(message.parent_batch_id)
        if running is not None:
            parent = running.batch.requests[message.parent_index]
            request.trace = parent.trace.child() if parent.trace is not None else None
            request.tenant = request.tenant or parent.tenant
        key = (worker, message.call_id)

        def answer(response: InferResponse) -> None:
            if response.final:
                self._inferences.pop(key, None)
            self._send_answer(worker, message.call_id, response)

        request.sink = answer
        self._inferences[key] = request
        if self.services is None:
            answer(InferResponse(error=Unavailable("this server offers models no inference")))
            return
        submit_for_model(self.services, request, message.decoupled)

    @staticmethod
    def _send_answer(worker: WorkerProcess, call_id: int, response: InferResponse) -> None:
        def send(block: int, memory: memoryview) -> None:
            refs, _ = write_tensors(response.outputs, memory)
            freed = worker.incoming.take_released()
            ref = response_ref(0, response, refs)
            worker.channel.send(m.InferAnswer(call_id, block, memory.nbytes, ref, freed))

        def refuse(error: EnginehouseError) -> None:
            ref = response_ref(0, InferResponse(error=error, final=response.final), [])
            worker.channel.send(m.InferAnswer(call_id, -1, 0, ref, []))

        worker.with_block(tensors_bytes(response.outputs), send, refuse)

    # --- the rest

    def _serve(self, worker: WorkerProcess, message: m.Service, model: str, version: int) -> None:
        try:
            value = self._call(message.method, message.arguments, model, version)
        except Exception as problem:
            self._answer(worker, message.call_id, None, as_error(problem))
            return
        if not isinstance(value, Awaitable):
            self._answer(worker, message.call_id, value, None)
            return
        task = asyncio.get_running_loop().create_task(self._answer_later(worker, message.call_id, value))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_later(self, worker: WorkerProcess, call_id: int, work: Awaitable[Any]) -> None:
        try:
            value, error = await work, None
        except Exception as problem:
            value, error = None, as_error(problem)
        self._answer(worker, call_id, value, error)

    @staticmethod
    def _answer(worker: WorkerProcess, call_id: int, value: Any, error: EnginehouseError | None) -> None:
        if call_id:
            worker.channel.send(m.Answer(call_id, value, m.ErrorRef.of(error) if error else None))
        elif error is not None:
            _logger.warning("a model's message to the server failed: %s", error)

    def _call(self, method: str, arguments: list[Any], model: str, version: int) -> Any:
        services = self.services
        if services is None:
            if method != "log":
                raise Unsupported(f"this server offers models no '{method}'")
            _logger.log(_LOG_LEVELS.get(arguments[0], logging.INFO), "%s", arguments[1])
            return None
        match method:
            case "log":
                return services.log(*arguments)
            case "metric":
                return services.metric(model, version, *arguments)
            case "load_model":
                return services.load_model(*arguments)
            case "unload_model":
                return services.unload_model(*arguments)
            case "is_model_ready":
                return services.is_model_ready(*arguments)
        raise Unsupported(f"models can't ask the server for '{method}'")
