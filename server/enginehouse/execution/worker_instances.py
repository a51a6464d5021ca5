"""An instance in a worker, and the batch that it runs: from a message to its answers.

The worker hands messages over; what is sent back goes through it, so that nobody else knows the channel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from enginehouse.backend import GenerativeInstance, Instance, Model, Placement, RequestInstance, TensorInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError
from enginehouse.execution import messages as m
from enginehouse.execution.answer_window import AnswerWindow
from enginehouse.execution.host_policy import run_on
from enginehouse.execution.joiners import joiner_of
from enginehouse.execution.refs import request_of, response_ref, tensors_bytes, write_tensors
from enginehouse.execution.running import Outcome, as_error, run_requests, run_tensors
from enginehouse.execution.slab import NO_BLOCK
from enginehouse.execution.worker_held import Pins, input_of
from enginehouse.execution.worker_services import ChannelServices
from enginehouse.types import InferRequest, InferResponse, Tensor

if TYPE_CHECKING:
    from enginehouse.execution.worker import Worker


class LoadedModel:
    """A version in this process."""

    def __init__(self, model: Model, config: ModelConfig, services: ChannelServices) -> None:
        self.model = model
        self.name = config.name
        self.joiner = joiner_of(config)
        self.decoupled = config.model_transaction_policy.decoupled
        self.services = services


class RunningRequests:
    """A batch of requests in an instance. Finals that are given before `execute` returns go out with it, in
    one message; a decoupled model's answers go out one by one, at once."""

    def __init__(self, worker: Worker, message: m.Execute, loaded: LoadedModel) -> None:
        self._worker = worker
        self.batch_id = message.batch_id
        self._joiner = loaded.joiner
        self._thread_id = threading.get_ident()
        self._collecting = not loaded.decoupled
        self._collected: list[tuple[int, InferResponse]] = []
        self._num_owed = len(message.requests)
        self._is_answered = [False] * self._num_owed
        self._windows = [AnswerWindow(request.max_ahead) for request in message.requests]
        memory = worker.channel.incoming.open(message.block, message.block_nbytes)
        self.requests = [self._view(index, ref, memory, loaded) for index, ref in enumerate(message.requests)]

    def _view(self, index: int, ref: m.RequestRef, memory: memoryview, loaded: LoadedModel) -> InferRequest:
        request = request_of(ref, memory)
        request.model_name = loaded.name
        request.sink = partial(self._respond, index)
        request.flow = (self.batch_id, index)
        return request

    def _respond(self, index: int, response: InferResponse) -> None:
        if self._is_answered[index]:
            return  # the client has gone with the final answer
        self._is_answered[index] = response.final
        response.outputs = self._joiner.pick(self.requests[index], response.outputs)
        if self._collecting and response.final and threading.get_ident() == self._thread_id:
            self._collected.append((index, response))
            return
        window = self._windows[index]
        if not (response.final or window.is_open):
            number = window.next_number()
            self._worker.channel.wait_until(lambda: window.has_room(number))
        self._send(index, response)
        if response.final:
            self._count_final(1)

    def take(self, index: int, num_taken: int) -> None:
        self._windows[index].take(num_taken)

    def cancel(self, index: int) -> None:
        self._windows[index].open()
        if index < len(self.requests):
            self.requests[index].cancel()

    def _send(self, index: int, response: InferResponse) -> None:
        channel = self._worker.channel
        try:
            block, memory = channel.allocate(tensors_bytes(response.outputs))
        except EnginehouseError as error:
            response = InferResponse(error=error, final=response.final)
            block, memory = NO_BLOCK, memoryview(b"")
        refs, _ = write_tensors(response.outputs, memory)
        freed = channel.incoming.take_released()
        channel.send(m.Respond(self.batch_id, block, memory.nbytes, response_ref(index, response, refs), freed))

    def _count_final(self, count: int) -> None:
        self._num_owed -= count
        if self._num_owed <= 0:
            self._worker.forget(self.batch_id)
            self.requests = []  # they know us: without this the input's block would wait for the collector

    def finish(self, outcome: Outcome) -> None:
        """Sends what was collected, and that the instance is free."""
        self._collecting = False
        collected, self._collected = self._collected, []
        channel = self._worker.channel
        sizes = [tensors_bytes(response.outputs) for _, response in collected]
        error, block, memory = outcome.error, NO_BLOCK, memoryview(b"")
        try:
            block, memory = channel.allocate(sum(sizes))
        except EnginehouseError as problem:
            error, collected = problem, []
        refs, offset = [], 0
        for index, response in collected:
            outputs, offset = write_tensors(response.outputs, memory, offset)
            refs.append(response_ref(index, response, outputs))
        if error is not None:
            self._is_answered = [True] * len(self._is_answered)  # the error is the answer to all that wait
        self._count_final(self._num_owed if error is not None else len(collected))
        del collected
        self._worker.send_done(self.batch_id, block, memory.nbytes, [], refs, error, outcome.times)


class WorkerInstance:
    """One instance and its progress words."""

    def __init__(self, worker: Worker, loaded: LoadedModel, message: m.Create) -> None:
        self._worker = worker
        self.loaded = loaded
        self._slot = message.slot
        run_on(message.cpu_cores)
        placement = Placement(
            message.name,
            message.device,
            message.group,
            cpu_cores=message.cpu_cores,
            more_devices=message.more_devices,
        )
        self.instance: Instance = loaded.model.create_instance(placement)
        self.jobs: SimpleQueue[Callable[[], None] | None] | None = None

    def execute(self, message: m.Execute, pins: Pins) -> None:
        start_ns = time.monotonic_ns()
        self._worker.note_progress(self._slot, message.batch_id, start_ns)
        try:
            if isinstance(self.instance, TensorInstance):
                self._run_tensors(self.instance, message, pins, start_ns)
            elif isinstance(self.instance, RequestInstance):
                self._run_requests(self.instance, message, start_ns)
        except EnginehouseError as problem:
            self._fail(message, start_ns, problem)
        except Exception as problem:
            self._fail(message, start_ns, as_error(problem))
        self._worker.note_progress(self._slot, 0, 0)

    def _run_tensors(self, instance: TensorInstance, message: m.Execute, pins: Pins, start_ns: int) -> None:
        channel = self._worker.channel
        memory = channel.incoming.open(message.block, message.block_nbytes)
        inputs = {ref.name: input_of(ref, memory, pins) for ref in message.joined}
        instance.kept_outputs = frozenset(message.kept)
        outcome = run_tensors(instance, start_ns, inputs, message.outputs)
        outputs = [tensor for tensor in outcome.outputs.values() if tensor.name not in instance.kept_outputs]
        block, target = channel.allocate(tensors_bytes(outputs))
        refs, _ = write_tensors(outputs, target)
        refs.extend(self._hold(tensor) for tensor in outcome.outputs.values() if tensor.name in instance.kept_outputs)
        times = outcome.times
        error = outcome.error
        # The views go before `take_released` is asked, so that the input's block goes back with this answer.
        del inputs, memory, outcome, outputs, pins
        self._worker.forget(message.batch_id)
        self._worker.send_done(message.batch_id, block, target.nbytes, refs, [], error, times)

    def _hold(self, tensor: Tensor) -> m.TensorRef:
        piece = self._worker.held.hold(tensor.data)
        return m.TensorRef(tensor.name, tensor.datatype.proto, tensor.shape, 0, 0, (piece,))

    def _run_requests(self, instance: RequestInstance, message: m.Execute, start_ns: int) -> None:
        running = RunningRequests(self._worker, message, self.loaded)
        self._worker.remember(running)
        outcome = run_requests(instance, start_ns, running.requests)
        running.finish(outcome)

    def _fail(self, message: m.Execute, start_ns: int, error: EnginehouseError) -> None:
        now_ns = time.monotonic_ns()
        times = (start_ns, now_ns, now_ns, now_ns)
        self._worker.forget(message.batch_id)
        self._worker.send_done(message.batch_id, NO_BLOCK, 0, [], [], error, times)

    def kind(self) -> str:
        if isinstance(self.instance, TensorInstance):
            return "tensors"
        return "generative" if isinstance(self.instance, GenerativeInstance) else "requests"
