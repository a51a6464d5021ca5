"""One worker process as the server sees it: calls to it, batches in it, its two slabs, and its end.

On the loop. Knows nothing of restarts or of what a model is for: `process_host` does.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from enginehouse.errors import EnginehouseError, FailureReason, Internal, ResourceExhausted, Unavailable
from enginehouse.execution import messages as m
from enginehouse.execution.answering import WorkerBatch
from enginehouse.execution.channel import Channel
from enginehouse.execution.contract import ExecutionTimes
from enginehouse.execution.growth import BookGrowth, Growth, not_booked
from enginehouse.execution.held import HeldTensors, kept_outputs, output_of, pieces_of
from enginehouse.execution.joining import JoinedTensor
from enginehouse.execution.open_calls import NoAnswer, OpenCalls
from enginehouse.execution.refs import request_ref, response_of, tensors_bytes, write_tensors
from enginehouse.execution.slab import (
    MIN_SEGMENT_BYTES,
    NO_BLOCK,
    FirstSegments,
    ReaderSlab,
    Segment,
    WriterSlab,
    aligned,
    block_bytes,
    make_shared_segment,
)
from enginehouse.execution.spawning import Child
from enginehouse.types import InferRequest

_FREED_ALONE = 32
"""So many blocks are told back without waiting for a message to ride on."""


Act = Callable[[int, memoryview], None]
Refuse = Callable[[EnginehouseError], None]


OnService: TypeAlias = "Callable[[WorkerProcess, Any], None]"
OnEnd: TypeAlias = "Callable[[WorkerProcess, str], None]"


class WorkerProcess:
    """`on_service` gets what models ask of the server. `on_end` is called once with how the process ended,
    after everything that it had answered was passed on and everything else has failed."""

    def __init__(
        self,
        child: Child,
        sock: socket.socket,
        what: str,
        on_service: OnService,
        on_end: OnEnd,
        segments: FirstSegments,
        book: BookGrowth = not_booked,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.what = what
        self.on_end = on_end
        self.on_service = on_service
        self._calls = OpenCalls()
        self._last_id = 0
        self.batches: dict[int, WorkerBatch] = {}
        self.engine_events: dict[int, Callable[[list[Any]], None]] = {}
        self.outgoing = WriterSlab()
        self.incoming = ReaderSlab()
        self.held = HeldTensors(self)
        self._growing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting_for_room: list[tuple[int, Act, Refuse]] = []
        self._growth = Growth(book)
        self.last_used_ns = 0
        self._is_trimmed = True
        self._kill_reason = ""
        self.alive = True
        self.busy_at_end: set[int] = set()
        """Instances that ran something when the process ended."""
        self.ended_for_a_tenant = False
        self._num_slots_taken = 0
        self.ended: asyncio.Future[str] = self._loop.create_future()
        self.child = child
        self.pid = child.pid
        self.channel = Channel(sock, self._loop, self._on_message, self._on_channel_end)
        self._loop.add_reader(self.child.pidfd, self._on_death)
        for of_worker, made in zip((False, True), segments, strict=True):
            self._share(of_worker, *made)

    # --- calls

    async def call(self, make: Callable[[int], Any], timeout_s: float | None = None) -> Any:
        """Sends `make(call_id)`; its reply's value. Raises the reply's error, or NoAnswer if the worker ends
        before or takes too long."""
        if not self.alive:
            raise NoAnswer(f"{self.what} is not running")
        call_id = self.new_id()
        return await self._calls.ask(call_id, lambda: self.channel.send(make(call_id)), self.what, timeout_s)

    def new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def take_slot(self) -> int:
        """A place for the progress words of a new instance."""
        self._num_slots_taken += 1
        return (self._num_slots_taken - 1) % (m.PROGRESS_BYTES // m.PROGRESS.size)

    def busy_since_s(self) -> float | None:
        """Since when an instance has worked on the batch that it has worked on for longest; a batch that was
        sent and not begun counts from then. None while nothing keeps an instance busy."""
        oldest_ns = 0
        for running in self.batches.values():
            if not running.instance_busy:
                continue  # decoupled: answers may take their time
            if running.is_held:
                continue  # it waits for somebody to take an answer
            begun_ns = max(self._begun_ns(running) or running.sent_ns, running.let_go_ns)
            oldest_ns = min(oldest_ns or begun_ns, begun_ns)
        return oldest_ns / 1e9 if oldest_ns else None

    def _begun_ns(self, running: WorkerBatch) -> int:
        place = running.slot * m.PROGRESS.size
        batch_id, since_ns = m.PROGRESS.unpack(self.incoming.at(0, place, m.PROGRESS.size))
        return int(since_ns) if batch_id == running.batch_id else 0

    # --- batches

    def execute(self, running: WorkerBatch) -> None:
        """Hands the batch over as soon as there is room for its inputs."""
        running.batch_id = self.new_id()
        running.sent_ns = time.monotonic_ns()
        self.last_used_ns = running.sent_ns
        self._is_trimmed = False
        self.batches[running.batch_id] = running
        if running.takes_tensors:
            requests, joiner = running.batch.requests, running.joiner
            joined, outputs = joiner.join(requests), joiner.requested_outputs(requests)
            if any(tensor.is_held and self.held.lacks(tensor) for tensor in joined):
                self._start(self._execute_fetched(running, joined, outputs))
            else:
                self._execute_joined(running, joined, outputs)
        else:
            nbytes = sum([tensors_bytes(request.inputs.values()) for request in running.batch.requests])
            self.with_block(nbytes, partial(self._send_requests, running), partial(self._refuse, running))

    async def _execute_fetched(self, running: WorkerBatch, joined: list[JoinedTensor], outputs: list[str]) -> None:
        """Inputs that another process holds are copied from there first."""
        try:
            joined = [await self.held.brought_here(tensor) for tensor in joined]
        except EnginehouseError as problem:
            self._refuse(running, problem)
            return
        if running.batch_id in self.batches:
            self._execute_joined(running, joined, outputs)

    def _execute_joined(self, running: WorkerBatch, joined: list[JoinedTensor], outputs: list[str]) -> None:
        nbytes = sum([aligned(tensor.nbytes) for tensor in joined])
        self.with_block(nbytes, partial(self._send_tensors, running, joined, outputs), partial(self._refuse, running))

    def _refuse(self, running: WorkerBatch, error: EnginehouseError) -> None:
        self.batches.pop(running.batch_id, None)
        running.fail(error)

    def _send_tensors(
        self,
        running: WorkerBatch,
        joined: list[JoinedTensor],
        outputs: list[str],
        block: int,
        memory: memoryview,
    ) -> None:
        refs, offset = [], 0
        for tensor in joined:
            tensor.write(memory[offset : offset + tensor.nbytes])
            pieces = pieces_of(tensor.parts, offset) if tensor.is_held else ()
            refs.append(m.TensorRef(tensor.name, tensor.datatype.proto, tensor.shape, offset, tensor.nbytes, pieces))
            offset += aligned(tensor.nbytes)
        freed, kept = self.incoming.take_released(), kept_outputs(running.batch.requests)
        self.channel.send(
            m.Execute(running.batch_id, running.instance_id, block, memory.nbytes, refs, outputs, [], freed, kept)
        )

    def _send_requests(self, running: WorkerBatch, block: int, memory: memoryview) -> None:
        refs, offset = [], 0
        for request in running.batch.requests:
            tensors, offset = write_tensors(request.inputs.values(), memory, offset)
            refs.append(request_ref(request, tensors))
            if request.max_ahead:
                request.on_taken = partial(self._tell_taken, running, len(refs) - 1)
        freed = self.incoming.take_released()
        self.channel.send(m.Execute(running.batch_id, running.instance_id, block, memory.nbytes, [], [], refs, freed))

    def cancel(self, running: WorkerBatch, index: int) -> None:
        self.channel.send(m.Cancel(running.batch_id, index))

    def _tell_taken(self, running: WorkerBatch, index: int, request: InferRequest) -> None:
        running.let_go_ns = time.monotonic_ns()
        self.channel.send(m.Taken(running.batch_id, index, request.num_taken, self.incoming.take_released()))

    # --- memory

    def with_block(self, nbytes: int, act: Act, refuse: Refuse) -> None:
        """Calls `act` with a block of that size: now, or after the slab has grown; or `refuse`."""
        if not self._waiting_for_room:
            block, memory = self.outgoing.allocate(nbytes) if nbytes else (NO_BLOCK, memoryview(b""))
            if block != NO_BLOCK or not nbytes:
                act(block, memory)
                return
        self._waiting_for_room.append((nbytes, act, refuse))
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        while self._waiting_for_room and self._growing is None and self.alive:
            nbytes, act, _ = self._waiting_for_room[0]
            block, memory = self.outgoing.allocate(nbytes) if nbytes else (NO_BLOCK, memoryview(b""))
            if block == NO_BLOCK and nbytes:
                self._growing = self._start(self._grow(nbytes))
                return
            del self._waiting_for_room[0]
            act(block, memory)

    async def _grow(self, nbytes: int) -> None:
        size = max(block_bytes(nbytes), self.outgoing.total_bytes)
        try:
            await self._add_segment(False, size)
        except (OSError, EnginehouseError) as problem:
            if self._waiting_for_room:
                _, _, refuse = self._waiting_for_room.pop(0)
                refuse(ResourceExhausted(f"{self.what}: no memory for {nbytes} bytes of input: {problem}"))
        self._growing = None
        self._serve_waiting()

    async def _grow_for_worker(self, nbytes: int) -> None:
        try:
            await self._add_segment(True, block_bytes(nbytes))
        except (OSError, EnginehouseError) as problem:
            self.channel.send(m.NoSegment(f"no memory for {nbytes} bytes of output: {problem}"))

    async def _add_segment(self, of_worker: bool, num_bytes: int) -> None:
        """Raises OSError or ResourceExhausted if it can't be had."""
        if self.alive:
            with self._growth.of(num_bytes):
                made = await self._loop.run_in_executor(None, make_shared_segment, of_worker, num_bytes)
            self._share(of_worker, *made)

    def trim(self) -> None:
        """Gives the pages of both slabs back; call when it has been idle for a while."""
        if not self._is_trimmed and not self.batches and self._grown:
            self._is_trimmed = self.outgoing.give_back_pages()
            self.channel.send(m.Freed(self.incoming.take_released()))
            self.channel.send(m.Trim())

    @property
    def _grown(self) -> bool:
        return max(self.outgoing.total_bytes, self.incoming.total_bytes) > MIN_SEGMENT_BYTES

    def _share(self, of_worker: bool, fd: int, segment: Segment) -> None:
        (self.incoming if of_worker else self.outgoing).add(segment)
        self.channel.send(m.Segment(of_worker, segment.nbytes), fd)

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- what the worker says

    def _on_message(self, message: Any) -> None:
        kind = type(message)
        if kind is m.Done:
            self.outgoing.free(message.freed)
            self._on_done(message)
        elif kind is m.Respond:
            self.outgoing.free(message.freed)
            self._on_respond(message)
        elif kind is m.Freed:
            self.outgoing.free(message.freed)
        elif kind is m.Reply:
            self._calls.on_reply(message)
        elif kind is m.Events:
            on_events = self.engine_events.get(message.instance_id)
            if on_events is not None:
                on_events(message.events)
        elif kind is m.NeedSegment:
            self._start(self._grow_for_worker(message.nbytes))
        else:
            if kind is m.Infer:
                self.outgoing.free(message.freed)
            self.on_service(self, message)
        if self._waiting_for_room:
            self._serve_waiting()
        if len(self.incoming.released) >= _FREED_ALONE:
            self.channel.send(m.Freed(self.incoming.take_released()))

    def _on_done(self, done: m.Done) -> None:
        running = self.batches.get(done.batch_id)
        device = running.batch.instance.device if running is not None and running.batch.instance is not None else "cpu"
        # taken in any case: what nobody wants is dropped with the last look at it
        held = {ref.name: self.held.take(ref.pieces[0], device) for ref in done.joined if ref.pieces}
        if running is None:
            return
        error = done.error.error() if done.error else None
        times = ExecutionTimes(*done.times)
        running.stamp(times)
        try:
            memory = self.incoming.open(done.block, done.block_nbytes)
            if running.takes_tensors and error is None:
                outputs = {ref.name: output_of(ref, memory, held) for ref in done.joined}
                for index, answer in enumerate(running.joiner.split(running.batch.requests, outputs)):
                    running.respond(index, running.response(index, answer))
            for ref in done.responses:
                running.respond(ref.index, self._response(ref, memory, running))
        except (EnginehouseError, ValueError) as problem:
            error = Internal(str(problem), reason=FailureReason.BACKEND)
        running.release(times, error)
        self._forget_if_finished(running)

    def _on_respond(self, message: m.Respond) -> None:
        memory = self.incoming.open(message.block, message.block_nbytes)
        running = self.batches.get(message.batch_id)
        if running is None:
            return
        running.respond(message.response.index, self._response(message.response, memory, running))
        self._forget_if_finished(running)

    def _forget_if_finished(self, running: WorkerBatch) -> None:
        if running.finished and self.batches.pop(running.batch_id, None) is not None:
            running.on_finished(running)

    @staticmethod
    def _response(ref: m.ResponseRef, memory: memoryview, running: WorkerBatch) -> Any:
        response = response_of(ref, memory, running.batch.requests[ref.index].id)
        response.model_name, response.model_version = running.model_name, running.model_version
        return response

    # --- its end

    def kill(self, reason: str) -> None:
        """Ends it now; requests in it fail with that reason."""
        if self.alive:
            self._kill_reason = self._kill_reason or reason
            self.child.kill()

    def end_for_a_tenant(self, reason: str) -> None:
        """As `kill`, because of a tenant that leaves and is stuck: those that stay are not to blame."""
        self.ended_for_a_tenant = True
        self.kill(reason)

    def _on_channel_end(self, reason: str) -> None:
        # A worker that leaves in order closes its channel and ends; one that only closed it is of no use.
        if self.alive:
            self._loop.call_later(1.0, self.kill, reason)

    def _on_death(self) -> None:
        self._loop.remove_reader(self.child.pidfd)
        self.channel.read_available()
        self.channel.close()
        self.alive = False
        how = self.child.reap()
        self._fail_everything(f"{self.what} {self._kill_reason or how}")
        # Never used again: their memory goes when the answers that still view it have gone.
        self.outgoing, self.incoming = WriterSlab(), ReaderSlab()
        self._growth.end()
        self.ended.set_result(self._kill_reason or how)
        self.on_end(self, self._kill_reason or how)

    def _fail_everything(self, reason: str) -> None:
        self._calls.fail_all(reason)
        waiting, self._waiting_for_room = self._waiting_for_room, []
        for _, _, refuse in waiting:
            refuse(Unavailable(reason, reason=FailureReason.BACKEND))
        batches, self.batches = self.batches, {}
        self.busy_at_end = {running.instance_id for running in batches.values()}
        for running in batches.values():
            running.fail(Unavailable(f"{reason} while it ran this request", reason=FailureReason.BACKEND))

    async def stop(self, grace_s: float) -> None:
        """Ends it: by closing the channel, which it takes as the word to leave; by force after the grace."""
        if not self.alive:
            return
        self._kill_reason = "was stopped"
        self.channel.close()
        try:
            await asyncio.wait_for(asyncio.shield(self.ended), grace_s)
        except TimeoutError:
            self.child.kill()
            await self.ended
