"""Real sockets on loopback: keep-alive, pipelining, streams, limits, and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from enginehouse.frontends.http_message import Buffer, HttpRequest, HttpResponse, HttpStream, Reply
from enginehouse.frontends.http_transport import HttpServer, RefuseLength
from enginehouse.frontends.openai.errors import refuse_length

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo(request: HttpRequest) -> Reply:
    return HttpResponse(200, "text/plain", (request.method.encode(), b" ", request.body))


@asynccontextmanager
async def serving(
    handle: Callable[[HttpRequest], Awaitable[Reply]],
    max_body_bytes: int = 0,
    refuse_length: RefuseLength | None = None,
) -> AsyncIterator[tuple[HttpServer, Callable[[], Awaitable[Connection]]]]:
    server = HttpServer(handle, "HTTP", "127.0.0.1", 0, max_body_bytes=max_body_bytes, refuse_length=refuse_length)
    await server.start()
    writers: list[asyncio.StreamWriter] = []

    async def connect() -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writers.append(writer)
        return reader, writer

    try:
        yield server, connect
    finally:
        for writer in writers:
            writer.close()
        await server.stop(1.0)
        assert not server.connections or all(c.task is None for c in server.connections)


def post(body: bytes, extra: bytes = b"") -> bytes:
    return b"POST /x HTTP/1.1\r\n" + extra + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head, await reader.readexactly(length)


@pytest.mark.asyncio
async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving(echo) as (_, connect):
        reader, writer = await connect()
        writer.write(post(b"one") + post(b"two") + b"GET /y HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert [(await read_answer(reader))[1] for _ in range(3)] == [b"POST one", b"POST two", b"GET "]
        assert await reader.read() == b""


@pytest.mark.asyncio
async def test_a_large_body_arrives_whole() -> None:
    body = bytes(range(256)) * 8192
    async with serving(echo) as (_, connect):
        reader, writer = await connect()
        for _ in range(2):
            writer.write(post(body))
            assert (await read_answer(reader))[1] == b"POST " + body


@pytest.mark.asyncio
async def test_a_body_over_the_limit_gets_an_answer_and_the_connection_stays() -> None:
    async with serving(echo, max_body_bytes=1000) as (_, connect):
        reader, writer = await connect()
        writer.write(post(b"x" * 200_000) + post(b"ok"))
        head, body = await read_answer(reader)
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"request JSON size of 200000 bytes exceeds the maximum allowed input size of 1000 bytes" in body
        assert (await read_answer(reader))[1] == b"POST ok"


@pytest.mark.asyncio
async def test_a_body_in_too_many_chunks_is_refused() -> None:
    async with serving(echo) as (_, connect):
        reader, writer = await connect()
        head = b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"1\r\na\r\n" * 65537 + b"0\r\n\r\n")
        _, body = await read_answer(reader)
        assert b"Chunked request body exceeds maximum of 65536 non-empty chunks" in body


@pytest.mark.asyncio
async def test_a_client_that_waits_for_continue_gets_it() -> None:
    async with serving(echo) as (_, connect):
        reader, writer = await connect()
        writer.write(b"POST /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"{}")
        assert (await read_answer(reader))[1] == b"POST {}"


@pytest.mark.asyncio
async def test_what_is_no_http_closes_the_connection() -> None:
    async with serving(echo) as (_, connect):
        reader, writer = await connect()
        writer.write(b"HELLO\r\n\r\n")
        assert await reader.read() == b""


@pytest.mark.asyncio
async def test_http_1_0_closes_after_the_answer_unless_asked_not_to() -> None:
    async with serving(echo) as (_, connect):
        reader, writer = await connect()
        writer.write(b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"Connection: keep-alive" in (await read_answer(reader))[0]
        writer.write(b"GET /x HTTP/1.0\r\n\r\n")
        await read_answer(reader)
        assert await reader.read() == b""


@pytest.mark.asyncio
async def test_a_head_request_gets_no_body() -> None:
    async with serving(echo) as (_, connect):
        reader, writer = await connect()
        writer.write(b"HEAD /x HTTP/1.1\r\n\r\n" + post(b"z"))
        assert b"Content-Length: 5" in await reader.readuntil(b"\r\n\r\n")
        assert (await read_answer(reader))[1] == b"POST z"


async def count_up(closed: asyncio.Event) -> AsyncIterator[Buffer]:
    try:
        number = 0
        while True:
            yield b"%d;" % number
            number += 1
            await asyncio.sleep(0)
    finally:
        closed.set()


@pytest.mark.asyncio
async def test_a_client_that_leaves_closes_its_stream() -> None:
    closed = asyncio.Event()

    async def stream(request: HttpRequest) -> Reply:
        return HttpStream(200, "text/plain", count_up(closed))

    async with serving(stream) as (_, connect):
        reader, writer = await connect()
        writer.write(b"GET /x HTTP/1.1\r\n\r\n")
        await reader.readuntil(b"0;")
        writer.close()
        await asyncio.wait_for(closed.wait(), 5)


@pytest.mark.asyncio
async def test_a_client_that_does_not_read_stops_the_stream_until_it_does() -> None:
    num_made = 0

    async def much() -> AsyncIterator[Buffer]:
        nonlocal num_made
        for _ in range(400):
            num_made += 1
            yield b"x" * 100_000

    async def stream(request: HttpRequest) -> Reply:
        return HttpStream(200, "text/plain", much())

    async with serving(stream) as (_, connect):
        reader, writer = await connect()
        writer.write(b"GET /x HTTP/1.1\r\nConnection: close\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(1000):
            await asyncio.sleep(0)
        assert num_made < 400
        assert len(await reader.read()) > 400 * 100_000
        assert num_made == 400


@pytest.mark.asyncio
async def test_a_client_that_leaves_cancels_its_handler() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(request: HttpRequest) -> Reply:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    async with serving(wait) as (_, connect):
        _, writer = await connect()
        writer.write(post(b""))
        await started.wait()
        writer.close()
        await asyncio.wait_for(cancelled.wait(), 5)


@pytest.mark.asyncio
async def test_stopping_lets_requests_in_flight_end() -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def wait(request: HttpRequest) -> Reply:
        started.set()
        await go.wait()
        return await echo(request)

    async with serving(wait) as (server, connect):
        reader, writer = await connect()
        idle_reader, _ = await connect()
        writer.write(post(b"late"))
        await started.wait()
        stopping = asyncio.create_task(server.stop(5.0))
        assert await idle_reader.read() == b""
        go.set()
        head, body = await read_answer(reader)
        assert (b"Connection: close" in head, body) == (True, b"POST late")
        await stopping


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("value", "text"), [("x1", "is not an integer"), ("", "is not an integer"), ("-5", "negative")]
)
async def test_lengths_that_are_none_are_answered_where_clients_expect_it(value: str, text: str) -> None:
    async with serving(echo, refuse_length=refuse_length) as (_, connect):
        for path, answered in (("/v1/completions", True), ("/v2/models/m/infer", False)):
            reader, writer = await connect()
            writer.write(f"POST {path} HTTP/1.1\r\nContent-Length: {value}\r\n\r\n{{}}".encode())
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 400 ") is answered
            assert (b'"code":"invalid_content_length"' in answer and text.encode() in answer) is answered
