"""Instances in threads of the server's process: least delay, for native runtimes that release the GIL.

Each instance has a thread of its own, so that frameworks with per-thread state see one thread for life.
Nothing here can stop a stuck call or survive a native crash: models that may do that go into a process.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from queue import SimpleQueue

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
from enginehouse.errors import FailureReason, Unavailable
from enginehouse.execution.answer_window import AnswerWindow
from enginehouse.execution.answering import RunningBatch
from enginehouse.execution.contract import Batch, ExecutionTimes, HostHealth, HostState, Remains
from enginehouse.execution.generations import Generations
from enginehouse.execution.host_policy import run_on
from enginehouse.execution.joiners import joiner_of
from enginehouse.execution.joining import Joiner
from enginehouse.execution.mailbox import Mailbox
from enginehouse.execution.patience import Progress, ends_in_time
from enginehouse.execution.running import Outcome, as_error, run_requests, run_tensors, view_for_instance
from enginehouse.types import GenerateRequest, InferRequest, InferResponse, MetricFamily, TokenEvent

logger = logging.getLogger("enginehouse.execution")

END_GRACE_S = 1.0


class ThreadInstance:
    """An InstanceHandle. Made by `start`, which returns once the backend's instance exists."""

    num_slots = 1

    def __init__(self, model: ThreadHostedModel, placement: Placement) -> None:
        self.name = placement.name
        self.device = placement.device
        self.group = placement.group
        self.available = True
        self.placement = placement
        self.instance: Instance | None = None
        self._model = model
        self._jobs: SimpleQueue[RunningBatch | None] = SimpleQueue()
        self._running: set[RunningBatch] = set()
        self._taken = threading.Condition()
        """Guards the counting of the windows and wakes a model that waits for its answers to be taken."""
        self._windows: dict[InferRequest, AnswerWindow] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._work, name=f"instance {placement.name}", daemon=True)
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        self._thread.start()
        try:
            await self._started
        except BaseException:
            self._thread.join()
            raise

    def execute(self, batch: Batch) -> None:
        running = RunningBatch(batch, self._model.name, self._model.version, self._model.progress)
        self._running.add(running)
        self._idle.clear()
        for request in batch.requests:
            if request.max_ahead:
                self._windows[request] = AnswerWindow(request.max_ahead)
                request.on_taken = self._take
        self._jobs.put(running)

    def _take(self, request: InferRequest) -> None:
        window = self._windows.get(request)
        if window is not None:
            with self._taken:
                window.take(request.num_taken)
                self._taken.notify_all()

    def _open_window(self, request: InferRequest) -> None:
        window = self._windows.pop(request, None)
        if window is not None:
            with self._taken:
                window.open()
                self._taken.notify_all()

    def cancel(self, request: InferRequest) -> None:
        self._open_window(request)
        for running in self._running:
            index = running.index_of(request)
            if index is not None and index < len(running.views):
                running.views[index].cancel()

    async def close(self) -> None:
        """Waits for what is running; then the backend's instance is closed in its own thread. Returns without
        `closed` when neither ends in time."""
        self.available = False
        model = self._model
        if not await ends_in_time(self._idle.wait(), model.progress.look, model.patience_s):
            self.end(f"was to go and answered nothing for {model.patience_s:g} s")
            return
        self._jobs.put(None)
        await ends_in_time(asyncio.shield(self.closed), model.progress.look, model.patience_s)

    def join(self) -> None:
        """After `closed`: the thread is on its last instruction."""
        self._thread.join()

    def end(self, why: str) -> None:
        """Fails what is running. The thread itself can't be ended: it leaves when its call returns."""
        self.available = False
        now_ns = time.monotonic_ns()
        error = Unavailable(f"instance '{self.name}' {why}", reason=FailureReason.BACKEND)
        for running in list(self._running):
            running.release(ExecutionTimes(now_ns, now_ns, now_ns, now_ns), error)
            self._forget_if_finished(running)
        self._jobs.put(None)

    # --- on the loop, told by the thread

    def _on_response(self, running: RunningBatch, index: int, response: InferResponse) -> None:
        running.respond(index, response)
        self._forget_if_finished(running)

    def _on_outcome(self, running: RunningBatch, outcome: Outcome, answers: Sequence[InferResponse]) -> None:
        times = ExecutionTimes(*outcome.times)
        running.stamp(times)
        for index, answer in enumerate(answers):
            running.respond(index, answer)
        running.release(times, outcome.error)
        self._forget_if_finished(running)

    def _forget_if_finished(self, running: RunningBatch) -> None:
        if running.finished:
            for request in running.batch.requests:
                self._open_window(request)
            self._running.discard(running)
            if not self._running:
                self._idle.set()

    # --- in the thread

    def _work(self) -> None:
        post = self._model.mailbox.post
        try:
            run_on(self.placement.cpu_cores)
            self.instance = self._model.model.create_instance(self.placement)
        except BaseException as problem:
            post(self._started.set_exception, as_error(problem))
            return
        post(_settle, self._started)
        while (job := self._jobs.get()) is not None:
            self._run(job)
            del job  # else the thread would keep the last batch's tensors alive while it waits
        try:
            self.instance.close()
        except Exception:
            logger.exception("instance '%s' of model '%s' did not close cleanly", self.name, self._model.name)
        self.instance = None
        post(_settle, self.closed)

    def _run(self, running: RunningBatch) -> None:
        start_ns = time.monotonic_ns()
        answers: list[InferResponse] = []
        try:
            outcome = self._run_instance(running, start_ns, answers)
        except Exception as problem:  # joining or splitting: the batch fails, the thread goes on
            now_ns = time.monotonic_ns()
            outcome = Outcome((start_ns, now_ns, now_ns, now_ns), {}, as_error(problem))
            answers = []
        self._model.mailbox.post(self._on_outcome, running, outcome, answers)

    def _run_instance(self, running: RunningBatch, start_ns: int, answers: list[InferResponse]) -> Outcome:
        requests, joiner = running.batch.requests, self._model.joiner
        if isinstance(self.instance, TensorInstance):
            inputs = {joined.name: joined.gather() for joined in joiner.join(requests)}
            outcome = run_tensors(self.instance, start_ns, inputs, joiner.requested_outputs(requests))
            if outcome.error is None:
                split = joiner.split(requests, outcome.outputs)
                answers.extend(running.response(index, outputs) for index, outputs in enumerate(split))
            return outcome
        assert isinstance(self.instance, RequestInstance), "a generative instance runs no batches: a bug"
        mailbox = self._model.mailbox
        windows = [self._windows.get(request) for request in requests]

        def respond(index: int, response: InferResponse) -> None:
            response.outputs = joiner.pick(requests[index], response.outputs)
            response.model_name, response.model_version = running.model_name, running.model_version
            response.id = requests[index].id
            window = windows[index]
            if window is not None and not response.final:
                number = window.next_number()
                with self._taken:
                    self._taken.wait_for(lambda: window.has_room(number))
            mailbox.post(self._on_response, running, index, response)

        for index, request in enumerate(requests):
            running.views.append(view_for_instance(request, index, request.inputs, request.requested_outputs, respond))
        return run_requests(self.instance, start_ns, running.views)


class ThreadGenerative:
    """A GenerativeHandle over an engine in this process; events come back on the loop."""

    def __init__(self, instance: GenerativeInstance, mailbox: Mailbox) -> None:
        self._instance = instance
        self.generations = Generations()
        instance.start(partial(mailbox.post, self.generations.on_events))

    def submit(self, request: GenerateRequest, emit: Callable[[TokenEvent], None]) -> None:
        self.generations.open(request.id, emit)
        try:
            self._instance.submit(request)
        except BaseException:
            self.generations.forget(request.id)
            raise

    def cancel(self, request_id: str) -> None:
        self._instance.cancel(request_id)

    async def metrics(self) -> Sequence[MetricFamily]:
        return await asyncio.get_running_loop().run_in_executor(None, self._instance.metrics)


class ThreadHostedModel:
    """A HostedModel whose instances are threads of this process."""

    def __init__(
        self, context: LoadContext, model: Model, mailbox: Mailbox, joiner: Joiner, patience_s: float
    ) -> None:
        self.config = context.config
        self.name = context.name
        self.version = str(context.version)
        self.model = model
        self.mailbox = mailbox
        self.joiner = joiner
        self.patience_s = patience_s
        self.progress = Progress()
        self.shared_processes: frozenset[object] = frozenset()
        """None: in the server's own process nothing is copied between models anyhow."""
        self._left_behind: list[ThreadInstance] = []
        self._closing: asyncio.Future[Remains | None] | None = None
        self.all_instances: list[ThreadInstance] = []
        self.generative: ThreadGenerative | None = None
        self.health = HostHealth(HostState.READY)
        self.on_closed: Callable[[], None] = lambda: None

    @property
    def instances(self) -> Sequence[ThreadInstance]:
        return [instance for instance in self.all_instances if not instance.placement.passive]

    async def is_ready(self) -> bool:
        return self.health.state is HostState.READY

    async def set_instances(self, placements: Sequence[Placement]) -> None:
        wanted = {placement.name: placement for placement in placements}
        kept = [instance for instance in self.all_instances if wanted.get(instance.name) == instance.placement]
        gone = [instance for instance in self.all_instances if instance not in kept]
        present = {instance.name for instance in kept}
        started = list(kept)
        try:
            for placement in placements:
                if placement.name not in present:
                    instance = ThreadInstance(self, placement)
                    await instance.start()
                    started.append(instance)
        except BaseException:
            for instance in started:
                if instance not in kept:
                    await instance.close()
            raise
        order = {placement.name: place for place, placement in enumerate(placements)}
        self.all_instances = sorted(started, key=lambda instance: order[instance.name])
        for instance in gone:
            await instance.close()
            if instance.closed.done():
                instance.join()
            else:
                self._left_behind.append(instance)
        self._find_generative()

    def _find_generative(self) -> None:
        for handle in self.all_instances:
            if isinstance(handle.instance, GenerativeInstance) and self.generative is None:
                self.generative = ThreadGenerative(handle.instance, self.mailbox)

    async def close(self) -> Remains | None:
        return await self._close_once(self._close_instances)

    async def end(self, why: str) -> Remains | None:
        for instance in self.all_instances:
            instance.end(why)
        if self.generative is not None:
            self.generative.generations.fail_all(Unavailable(f"model '{self.name}' {why}"))
        return await self._close_once(self._wait_a_moment)

    async def _close_once(self, close_instances: Callable[[], Awaitable[None]]) -> Remains | None:
        """At the end of the server an unload that still waits and `Hosts.close` both come here."""
        if self._closing is None:
            self.health = HostHealth(HostState.FAILED, "closed")
            self._closing = asyncio.ensure_future(self._close(close_instances))
        return await asyncio.shield(self._closing)

    async def _close(self, close_instances: Callable[[], Awaitable[None]]) -> Remains | None:
        await close_instances()
        hung = [instance for instance in (*self._left_behind, *self.all_instances) if not instance.closed.done()]
        for instance in self.all_instances:
            if instance.closed.done():
                instance.join()
        self.all_instances = []
        if not hung:
            await self._bury(hung)
            return None
        names = ", ".join(f"'{instance.name}'" for instance in hung)
        text = (
            f"instance {names} still runs in the server's process, where nothing can end it: its memory is held "
            f"until its call returns"
        )
        logger.error("model '%s' version %s: %s", self.name, self.version, text)
        return Remains(text, asyncio.ensure_future(self._bury(hung)))

    async def _close_instances(self) -> None:
        await asyncio.gather(*(instance.close() for instance in self.all_instances))

    async def _wait_a_moment(self) -> None:
        """Instances that are not stuck leave at once."""
        if self.all_instances:
            await asyncio.wait([instance.closed for instance in self.all_instances], timeout=END_GRACE_S)

    async def _bury(self, hung: Sequence[ThreadInstance]) -> None:
        if hung:
            await asyncio.wait([instance.closed for instance in hung])
        await asyncio.get_running_loop().run_in_executor(None, self.model.close)
        self.on_closed()


async def load_in_threads(
    backend: Backend, context: LoadContext, placements: Sequence[Placement], mailbox: Mailbox, patience_s: float
) -> ThreadHostedModel:
    """Raises what the backend raises, with nothing left behind."""
    loop = asyncio.get_running_loop()
    try:
        model = await loop.run_in_executor(None, backend.load, context)
    except Exception as problem:
        raise as_error(problem) from problem
    hosted = ThreadHostedModel(context, model, mailbox, joiner_of(context.config), patience_s)
    try:
        await hosted.set_instances(placements)
    except BaseException:
        await loop.run_in_executor(None, model.close)
        raise
    return hosted


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
