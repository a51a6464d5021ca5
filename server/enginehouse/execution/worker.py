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
    LoadContext,
    RequestInstance,
)
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError
from enginehouse.execution import messages as m
from enginehouse.execution.backends import BackendSource
from enginehouse.execution.running import Nanoseconds, as_error
from enginehouse.execution.worker_channel import ChannelClosed, WorkerChannel
from enginehouse.execution.worker_held import HeldInWorker
from enginehouse.execution.worker_instances import LoadedModel, RunningRequests, WorkerInstance
from enginehouse.execution.worker_services import ChannelServices, WorkerCalls


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
        self.held = HeldInWorker()
        self._fetches: SimpleQueue[Callable[[], None] | None] | None = None

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
            pins = self.held.pin(message)
            if hosted.jobs is None:
                self._jobs.append((hosted.execute, (message, pins)))
            else:
                hosted.jobs.put(partial(hosted.execute, message, pins))
            return
        match message:
            case m.Cancel():
                self._cancel(message)
            case m.Taken():
                running = self._running.get(message.batch_id)
                if running is not None:
                    running.take(message.index, message.num_taken)
            case m.InferAnswer():
                self._calls.on_infer_answer(message)
            case m.Drop():
                self.held.drop(message.numbers)
            case m.Fetch():
                self._fetch(message)
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

    def _fetch(self, message: m.Fetch) -> None:
        """On a thread of its own: it may wait for room in the slab, which this thread makes."""
        if self._fetches is None:
            self._fetches = SimpleQueue()
            threading.Thread(target=self._work, args=(self._fetches,), name="fetch", daemon=True).start()
        self._fetches.put(partial(self._reply_to, message.call_id, partial(self._copy_held, message.piece)))

    def _copy_held(self, piece: m.Piece) -> int:
        data = self.held.bytes_of(piece)
        block, memory = self.channel.allocate(data.nbytes)
        memory[:] = data
        return block

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
        for index in range(len(running.requests)):
            if (running.batch_id, index) in self._early_cancels:
                self._early_cancels.discard((running.batch_id, index))
                running.cancel(index)

    def forget(self, batch_id: int) -> None:
        self._running.pop(batch_id, None)
        self._queued.discard(batch_id)

    def _cancel(self, message: m.Cancel) -> None:
        running = self._running.get(message.batch_id)
        if running is None:
            if message.batch_id in self._queued:
                self._early_cancels.add((message.batch_id, message.index))
        else:
            running.cancel(message.index)

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
