"""Results by callback, and the two transports that take them without a task."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from tests.unit.frontends.test_http2 import Wire, data, headers, message
from tests.unit.frontends.test_http_transport import post, read_answer, serving

from enginehouse.errors import InvalidArgument
from enginehouse.frontends.grpc_call import Method
from enginehouse.frontends.http2_frames import Http2Code, rst_stream
from enginehouse.frontends.http_message import HttpRequest, HttpResponse
from enginehouse.frontends.pending import Pending, close_with


class Work(Pending[Any]):
    __slots__ = ("left",)

    def __init__(self) -> None:
        super().__init__()
        self.left = asyncio.Event()

    def leave(self) -> None:
        self.left.set()


class Handler:
    """Gives a Work to every request. `answer`, if given, resolves it at once."""

    def __init__(self, answer: HttpResponse | None = None) -> None:
        self.works: list[Work] = []
        self.asked = asyncio.Event()
        self._answer = answer

    def __call__(self, request: HttpRequest) -> Work:
        work = Work()
        self.works.append(work)
        self.asked.set()
        if self._answer is not None or bytes(request.body) == b"at once":
            work.resolve(self._answer or HttpResponse(200, body=(b"now",)))
        return work


@pytest.mark.asyncio
async def test_a_result_is_taken_whether_it_comes_before_or_after() -> None:
    early, late = Work(), Work()
    early.resolve(1)
    taken: list[Any] = []
    for work in (early, late):
        work.then(taken.append)
    late.resolve(2)
    assert taken == [1, 2]


@pytest.mark.asyncio
async def test_it_can_be_awaited_and_raises_what_it_got() -> None:
    good, bad, forgotten = Work(), Work(), Work()
    good.resolve("yes")
    assert await good == "yes"
    asyncio.get_running_loop().call_soon(bad.resolve, ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        await bad
    waiting = asyncio.ensure_future(forgotten)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert forgotten.left.is_set()
    forgotten.resolve("late")  # and nobody minds


@pytest.mark.asyncio
async def test_http_answers_pipelined_requests_in_order_however_their_results_come() -> None:
    handler = Handler()

    async with serving(handler) as (_, connect):
        reader, writer = await connect()
        writer.write(post(b"wait") + post(b"at once") + post(b"at once"))
        await handler.asked.wait()
        assert len(handler.works) == 1, "one request at a time"
        handler.works[0].resolve(HttpResponse(200, body=(b"waited",)))
        assert [(await read_answer(reader))[1] for _ in range(3)] == [b"waited", b"now", b"now"]


@pytest.mark.asyncio
async def test_http_tells_the_work_that_its_client_has_left() -> None:
    handler = Handler()

    async with serving(handler) as (_, connect):
        _, writer = await connect()
        writer.write(post(b""))
        await handler.asked.wait()
        writer.close()
        await asyncio.wait_for(handler.works[0].left.wait(), 1)


@pytest.mark.asyncio
async def test_http_holds_the_next_request_back_while_the_client_does_not_read() -> None:
    handler = Handler(HttpResponse(200, body=(bytes(8 << 20),)))

    async with serving(handler) as (_, connect):
        reader, writer = await connect()
        writer.write(post(b"") * 3)
        await handler.asked.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(handler.works) == 1
        for _ in range(3):
            assert len((await read_answer(reader))[1]) == 8 << 20


@pytest.mark.asyncio
async def test_a_server_that_stops_waits_for_pending_answers() -> None:
    handler = Handler()

    async with serving(handler) as (server, connect):
        reader, writer = await connect()
        writer.write(post(b""))
        await handler.asked.wait()
        stopping = asyncio.ensure_future(server.stop(5))
        await asyncio.sleep(0)
        handler.works[0].resolve(HttpResponse(200, body=(b"done",)))
        head, body = await read_answer(reader)
        assert body == b"done"
        assert b"Connection: close" in head
        await stopping


@pytest.mark.asyncio
async def test_grpc_answers_and_fails_by_callback() -> None:
    works: list[Work] = []

    def ask(request: bytes, call: object) -> Work:
        works.append(Work())
        return works[-1]

    wire = Wire({"/ask": Method(None, ask)})
    for stream_id in (1, 3, 5):
        wire.send(headers("/ask", stream_id), data(message(b"?"), stream_id))
    works[1].resolve(InvalidArgument("not so"))
    works[0].resolve(b"answer")
    frames = await wire.frames()
    assert [(kind, stream_id) for kind, _, stream_id, _ in frames if stream_id] == [(1, 3), (1, 1), (0, 1), (1, 1)]
    wire.send(rst_stream(5, Http2Code.CANCEL))
    assert works[2].left.is_set()
    works[2].resolve(b"late")
    assert await wire.frames() == []


@pytest.mark.asyncio
async def test_a_deadline_leaves_the_work() -> None:
    work = Work()
    wire = Wire({"/ask": Method(None, lambda request, call: work)})
    wire.send(headers("/ask", grpc_timeout="1m"), data(message(b"?")))
    await asyncio.wait_for(work.left.wait(), 1)
    _, fields = await wire.answer()
    assert fields["grpc-status"] == "4"


async def test_a_task_cancelled_before_its_first_step_closes_what_it_would_have_awaited() -> None:
    async def method() -> bytes:
        return b"answer"

    async def run() -> None:
        await answer

    answer = method()
    task = asyncio.ensure_future(run())
    close_with(task, answer)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert inspect.getcoroutinestate(answer) == inspect.CORO_CLOSED


async def test_a_task_that_runs_gets_its_answer() -> None:
    async def method() -> bytes:
        return b"answer"

    answer = method()
    task = asyncio.ensure_future(answer)
    close_with(task, answer)
    assert await task == b"answer"
