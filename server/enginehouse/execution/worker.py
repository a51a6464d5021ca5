"""The program of a worker process: loads models, runs their batches, and leaves when the server does.

    python -m enginehouse.execution.worker <channel descriptor> <server's pid> <solo|shared>

`solo` runs its first instance on the main thread, `shared` each instance on a thread of its own. The backend
code is the same as in the server's threads and can't tell the difference.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from enginehouse.backend import (
    Backend,
    GenerativeInstance,
    Instance,
    LoadContext,
    Model,
    Placement,
    RequestInstance,
    TensorInstance,
)
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError
from enginehouse.execution import messages as m
from enginehouse.execution.backends import BackendSource
from enginehouse.execution.host_policy import run_on
from enginehouse.execution.joiners import joiner_of
from enginehouse.execution.refs import request_of, response_ref, tensor_of, tensors_bytes, write_tensors
from enginehouse.execution.running import Nanoseconds, Outcome, as_error, run_requests, run_tensors
from enginehouse.execution.slab import NO_BLOCK
from enginehouse.execution.worker_channel import ChannelClosed, WorkerChannel
from enginehouse.execution.worker_services import ChannelServices, WorkerCalls
from enginehouse.types import InferRequest, InferResponse


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
        self._send(index, response)
        if response.final:
            self._count_final(1)

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
        placement = Placement(message.name, message.device, message.group, cpu_cores=message.cpu_cores)
        self.instance: Instance = loaded.model.create_instance(placement)
        self.jobs: SimpleQueue[Callable[[], None] | None] | None = None

    def execute(self, message: m.Execute) -> None:
        start_ns = time.monotonic_ns()
        self._worker.note_progress(self._slot, message.batch_id, start_ns)
        try:
            if isinstance(self.instance, TensorInstance):
                self._run_tensors(self.instance, message, start_ns)
            elif isinstance(self.instance, RequestInstance):
                self._run_requests(self.instance, message, start_ns)
        except EnginehouseError as problem:
            self._fail(message, start_ns, problem)
        except Exception as problem:
            self._fail(message, start_ns, as_error(problem))
        self._worker.note_progress(self._slot, 0, 0)

    def _run_tensors(self, instance: TensorInstance, message: m.Execute, start_ns: int) -> None:
        channel = self._worker.channel
        memory = channel.incoming.open(message.block, message.block_nbytes)
        inputs = {ref.name: tensor_of(ref, memory) for ref in message.joined}
        outcome = run_tensors(instance, start_ns, inputs, message.outputs)
        outputs = list(outcome.outputs.values())
        block, target = channel.allocate(tensors_bytes(outputs))
        refs, _ = write_tensors(outputs, target)
        times = outcome.times
        error = outcome.error
        # The views go before `take_released` is asked, so that the input's block goes back with this answer.
        del inputs, memory, outcome, outputs
        self._worker.forget(message.batch_id)
        self._worker.send_done(message.batch_id, block, target.nbytes, refs, [], error, times)

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


class Worker:
    """Everything in this process. Messages arrive on whichever thread reads the channel."""

    def __init__(self, sock: socket.socket, solo: bool) -> None:
        self.channel = WorkerChannel(sock, self._on_message, leave)
        self._solo = solo
        self._calls = WorkerCalls(self.channel)
        self._jobs: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._backends: dict[str, Backend] = {}
        self._models: dict[int, LoadedModel] = {}
        self._instances: dict[int, WorkerInstance] = {}
        self._running: dict[int, RunningRequests] = {}
        self._queued: set[int] = set()
        self._early_cancels: set[tuple[int, int]] = set()
        self._progress = memoryview(b"")

    def serve(self) -> None:
        """Until the server leaves."""
        self.channel.wait_until(lambda: self.channel.outgoing.num_segments > 0)
        _, self._progress = self.channel.allocate(m.PROGRESS_BYTES)
        if not self._solo:
            self.channel.read_in_thread()
        has_jobs: Callable[[], Any] = self._jobs.__len__
        while True:
            self.channel.wait_until(has_jobs)
            call, arguments = self._jobs.popleft()
            call(*arguments)
            del arguments  # else the last batch's input would be held until the next one

    # --- messages

    def _on_message(self, message: Any) -> None:
        if type(message) is m.Execute:
            hosted = self._instances.get(message.instance_id)
            if hosted is None:
                return
            self._queued.add(message.batch_id)
            if hosted.jobs is None:
                self._jobs.append((hosted.execute, (message,)))
            else:
                hosted.jobs.put(partial(hosted.execute, message))
            return
        match message:
            case m.Cancel():
                self._cancel(message)
            case m.InferAnswer():
                self._calls.on_infer_answer(message)
            case m.Answer():
                self._calls.on_answer(message)
            case m.Load():
                self._jobs.append((self._reply_to, (message.call_id, partial(self._load, message))))
            case m.CompleteConfig():
                self._jobs.append((self._reply_to, (message.call_id, partial(self._complete, message))))
            case m.Create():
                self._start_instance(message)
            case m.Close():
                job = partial(self._reply_to, message.call_id, partial(self._close, message.instance_id))
                self._do_for_instance(message.instance_id, lambda _: job())
            case m.Unload():
                self._jobs.append((self._reply_to, (message.call_id, partial(self._unload, message))))
            case m.Probe():
                job = partial(self._reply_to, message.call_id, partial(self._probe, message.instance_id))
                self._do_for_instance(message.instance_id, lambda _: job())
            case _:
                self._on_engine_message(message)

    def _on_engine_message(self, message: Any) -> None:
        hosted = self._instances.get(message.instance_id)
        if hosted is None or not isinstance(hosted.instance, GenerativeInstance):
            return
        engine = hosted.instance
        match message:
            case m.Generate():
                try:
                    engine.submit(message.request)
                except Exception as problem:
                    self.channel.send(
                        m.Refused(message.instance_id, message.request.id, m.ErrorRef.of(as_error(problem)))
                    )
            case m.CancelGenerate():
                engine.cancel(message.request_id)
            case m.EngineMetrics():
                self._reply_to(message.call_id, lambda: list(engine.metrics()))

    def _do_for_instance(self, instance_id: int, act: Callable[[WorkerInstance], None]) -> None:
        hosted = self._instances.get(instance_id)
        if hosted is None:
            return
        if hosted.jobs is not None:
            hosted.jobs.put(partial(act, hosted))
        else:
            self._jobs.append((act, (hosted,)))

    def _reply_to(self, call_id: int, work: Callable[[], Any]) -> None:
        try:
            value = work()
        except Exception as problem:
            self.channel.send(m.Reply(call_id, None, m.ErrorRef.of(as_error(problem))))
        else:
            self.channel.send(m.Reply(call_id, value))

    # --- models and instances

    def _context(self, source: m.ModelSource, model_id: int) -> LoadContext:
        config = ModelConfig.FromString(source.config)
        services = ChannelServices(self._calls, model_id, config.name)
        directory = Path(source.model_directory)
        return LoadContext(config, source.version, directory, services, source.backend_options)

    def _backend(self, source: m.ModelSource) -> Backend:
        if source.target not in self._backends:
            self._backends[source.target] = BackendSource(source.backend, source.target).make()
        return self._backends[source.target]

    def _complete(self, message: m.CompleteConfig) -> bytes:
        context = self._context(message.source, 0)
        return self._backend(message.source).complete_config(context).SerializeToString()

    def _load(self, message: m.Load) -> None:
        context = self._context(message.source, message.model_id)
        model = self._backend(message.source).load(context)
        assert isinstance(context.services, ChannelServices), "made above"
        self._models[message.model_id] = LoadedModel(model, context.config, context.services)

    def _start_instance(self, message: m.Create) -> None:
        """Each instance is made, run and closed by a thread of its own; a solo one by the main thread."""
        if self._solo and not self._instances:
            self._jobs.append((self._reply_to, (message.call_id, partial(self._create, message, None))))
            return
        jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        jobs.put(partial(self._reply_to, message.call_id, partial(self._create, message, jobs)))
        name = f"instance {message.name}"
        threading.Thread(target=self._work, args=(jobs,), name=name, daemon=True).start()
        self.channel.read_in_thread()

    @staticmethod
    def _work(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
        try:
            while (job := jobs.get()) is not None:
                job()
                del job
        except ChannelClosed:
            leave()

    def _create(self, message: m.Create, jobs: SimpleQueue[Callable[[], None] | None] | None) -> str:
        loaded = self._models[message.model_id]
        try:
            hosted = WorkerInstance(self, loaded, message)
        except BaseException:
            if jobs is not None:
                jobs.put(None)
            raise
        hosted.jobs = jobs
        self._instances[message.instance_id] = hosted
        instance = hosted.instance
        if isinstance(instance, GenerativeInstance):
            instance.start(lambda events: self.channel.send(m.Events(message.instance_id, list(events))))
        elif isinstance(instance, RequestInstance) and not instance.polls_for_cancellation:
            self.channel.read_in_thread()
        return hosted.kind()

    def _close(self, instance_id: int) -> None:
        hosted = self._instances.pop(instance_id)
        if hosted.jobs is not None:
            hosted.jobs.put(None)
        hosted.instance.close()

    def _unload(self, message: m.Unload) -> None:
        self._models.pop(message.model_id).model.close()

    def _probe(self, instance_id: int) -> bool:
        instance = self._instances[instance_id].instance
        return instance.is_ready() if isinstance(instance, RequestInstance) else True

    # --- batches

    def remember(self, running: RunningRequests) -> None:
        self._running[running.batch_id] = running
        self._queued.discard(running.batch_id)
        if not self._early_cancels:
            return
        for index, request in enumerate(running.requests):
            if (running.batch_id, index) in self._early_cancels:
                self._early_cancels.discard((running.batch_id, index))
                request.cancelled = True

    def forget(self, batch_id: int) -> None:
        self._running.pop(batch_id, None)
        self._queued.discard(batch_id)

    def _cancel(self, message: m.Cancel) -> None:
        running = self._running.get(message.batch_id)
        if running is None:
            if message.batch_id in self._queued:
                self._early_cancels.add((message.batch_id, message.index))
        elif message.index < len(running.requests):
            running.requests[message.index].cancel()

    def note_progress(self, slot: int, batch_id: int, since_ns: int) -> None:
        m.PROGRESS.pack_into(self._progress, slot * m.PROGRESS.size, batch_id, since_ns)

    def send_done(
        self,
        batch_id: int,
        block: int,
        nbytes: int,
        joined: list[m.TensorRef],
        responses: list[m.ResponseRef],
        error: EnginehouseError | None,
        times: Nanoseconds,
    ) -> None:
        self.channel.send(
            m.Done(
                batch_id,
                block,
                nbytes,
                joined,
                responses,
                m.ErrorRef.of(error) if error is not None else None,
                # the outputs are in the slab by now: writing them was the output's part
                (*times[:3], time.monotonic_ns()),
                self.channel.incoming.take_released(),
            )
        )


def die_with(server_pid: int) -> None:
    """Asks the kernel to end this process with the server, whatever it is doing then."""
    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != server_pid:
        os._exit(1)  # it went before we asked


def leave() -> None:
    """Ends the process from any thread, with exit functions run and threads not waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(0)


def main() -> None:
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]  # the interpreter puts it there; a model shall not import what lies around
    descriptor, server_pid, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    die_with(server_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = Worker(socket.socket(fileno=descriptor), mode == "solo")
    try:
        worker.serve()
    except ChannelClosed:
        leave()


if __name__ == "__main__":
    main()
