"""HTTP/1.1 under the handlers: sockets, keep-alive, backpressure, clients that leave.

One request at a time for each connection, in a task of its own unless its handler gives a Pending. What is no
HTTP closes the connection, as Triton does. A client that leaves cancels its handler.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeAlias, cast

from enginehouse.errors import InvalidArgument
from enginehouse.frontends.compression import too_large
from enginehouse.frontends.http1 import MAX_CHUNKS, BadRequest, Parser, Request
from enginehouse.frontends.http_message import (
    HttpPush,
    HttpRequest,
    HttpResponse,
    HttpStream,
    Reply,
    error_response,
)
from enginehouse.frontends.http_writing import PushChannel, chunk_of, head_of, write_whole
from enginehouse.frontends.listening import Certificates, listen, port_of, socket_name
from enginehouse.frontends.pending import Pending, close_with

Handle: TypeAlias = Callable[[HttpRequest], Awaitable[Reply]]
RefuseLarge: TypeAlias = Callable[[Request, int], HttpResponse]
RefuseLength: TypeAlias = Callable[[Request], HttpResponse | None]

_TITLES = {
    "HTTP": "HTTPService", "SageMaker": "Sagemaker HTTPService", "Vertex AI": "Vertex AI HTTPService",
}  # fmt: skip
"""What scripts look for in the log."""
_SCRATCH_BYTES = 65536
_MAX_PIPELINED = 32
_STALL_S = 120.0
"""A request that is half sent and then silent for so long is given up."""
_IDLE_S = 3600.0
_logger = logging.getLogger(__name__)


class HttpServer:
    """Listens on one address and gives every request to `handle`."""

    def __init__(
        self,
        handle: Handle,
        name: str,
        address: str,
        port: int,
        *,
        max_body_bytes: int = 0,
        reuse_port: bool = False,
        certificates: Certificates | None = None,
        refuse_large: RefuseLarge | None = None,
        refuse_length: RefuseLength | None = None,
    ) -> None:
        """`name` is for messages; `max_body_bytes` 0 is no limit; port 0 asks for a free one.

        `refuse_large` makes the answer to a body that is over the limit, `refuse_length` the one to a
        Content-Length that is no number: None where the connection just closes, as Triton's does.
        """
        self.handle = handle
        self._name = name
        self._address = address
        self.port = port
        self.max_body_bytes = max_body_bytes
        self._reuse_port = reuse_port
        self._certificates = certificates
        self._refuse_large = refuse_large or _refuse_large
        self.refuse_length = refuse_length or no_answer
        self.connections: set[_Connection] = set()
        self._all_gone: asyncio.Future[None] | None = None
        self._listener: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self.stopping = False

    async def start(self) -> None:
        """Raises Unavailable if the address is taken, InvalidArgument for certificates that are none."""
        loop = asyncio.get_running_loop()
        tls = None if self._certificates is None else self._certificates.context("http/1.1")
        self._listener = await listen(
            lambda: _Connection(self, loop),
            self._name,
            self._address,
            self.port,
            reuse_port=self._reuse_port,
            tls=tls,
        )
        self.port = port_of(self._listener, self.port)
        title = _TITLES.get(self._name, f"{self._name} Service")
        _logger.info("Started %s at %s", title, socket_name(self._address, self.port))
        self._sweep = loop.call_later(_STALL_S / 2, self._close_stalled, loop)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Takes no new connections, lets requests in flight end, then closes what is left."""
        self.stopping = True
        if self._sweep is not None:
            self._sweep.cancel()
        if self._listener is not None:
            self._listener.close()
        for connection in list(self.connections):
            connection.close_when_idle()
        if self.connections:
            self._all_gone = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._all_gone], timeout=grace_s)
        for connection in list(self.connections):
            connection.abort()

    def forget(self, connection: _Connection) -> None:
        self.connections.discard(connection)
        if self._all_gone is not None and not self.connections and not self._all_gone.done():
            self._all_gone.set_result(None)

    async def refusal(self, request: Request) -> Reply:
        """The answer to a request whose body was thrown away."""
        if request.too_large:
            return self._refuse_large(request, self.max_body_bytes)
        if request.bad_length:
            answer = self.refuse_length(request)
            assert answer is not None, "one without an answer is not accepted: a bug"
            return answer
        return error_response(InvalidArgument(f"Chunked request body exceeds maximum of {MAX_CHUNKS} non-empty chunks"))

    def _close_stalled(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self.connections):
            connection.close_if_stalled(now)
        self._sweep = loop.call_later(_STALL_S / 2, self._close_stalled, loop)


class _Connection(asyncio.BufferedProtocol):
    """Parses, runs the handler, writes the reply, and so on until somebody closes."""

    def __init__(self, server: HttpServer, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._parser = Parser(server.max_body_bytes)
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._space: memoryview | None = None
        self._waiting: deque[Request] = deque()
        self._transport: asyncio.Transport | None = None
        self._writable: asyncio.Future[None] | None = None
        self._reading_paused = False
        self._close_after: bool = False
        self._last_heard = loop.time()
        self._answering: tuple[Request, Pending[HttpResponse]] | None = None
        """What is answered without a task."""
        self.task: asyncio.Task[None] | None = None

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._waiting.clear()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        if self.task is not None:
            self.task.cancel()
        if self._answering is not None:
            self._answering[1].leave()
        self._server.forget(self)

    def eof_received(self) -> bool:
        return False  # who sends no more listens no more

    def get_buffer(self, size_hint: int) -> memoryview:
        self._space = self._parser.body_space()
        # A view of a body of a few bytes would cost more calls than it saves.
        if self._space is None or len(self._space) < _SCRATCH_BYTES:
            self._space = None
            return self._scratch
        return self._space

    def buffer_updated(self, num_bytes: int) -> None:
        self._last_heard = self._loop.time()
        if self._space is not None:
            self._space = None
            request = self._parser.body_received(num_bytes)
            if request is not None:
                self._accept(request)
            return
        try:
            for request in self._parser.feed(bytes(self._scratch[:num_bytes])):
                self._accept(request)
        except BadRequest as error:
            for request in error.args[1]:
                self._accept(request)
            self._close_after = True
            self._close_if_idle()
            return
        if self._parser.wants_continue and self._transport is not None and not self.is_busy:
            self._parser.wants_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # --- closing

    @property
    def is_busy(self) -> bool:
        return self.task is not None or self._answering is not None

    def close_when_idle(self) -> None:
        self._close_after = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if not self.is_busy and not self._waiting and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close_if_stalled(self, now: float) -> None:
        silent_s = now - self._last_heard
        if not self.is_busy and silent_s > (_STALL_S if self._parser.in_request else _IDLE_S):
            self.abort()

    # --- requests

    def _accept(self, request: Request) -> None:
        if self._close_after or (request.bad_length and self._server.refuse_length(request) is None):
            return
        self._waiting.append(request)
        if not request.keep_alive:
            self._close_after = True
        if not self.is_busy:
            self._next()
        elif len(self._waiting) >= _MAX_PIPELINED and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    def _next(self) -> None:
        if self._waiting and self._transport is not None:
            self._begin(self._waiting.popleft())
            return
        if self._transport is None:
            return
        if self._close_after:
            self._transport.close()
        elif self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()

    def _begin(self, request: Request) -> None:
        request.received_ns = time.monotonic_ns()
        if request.is_refused:
            self.task = self._loop.create_task(self._serve(request, self._server.refusal(request)))
            return
        answer = self._server.handle(request)
        if isinstance(answer, Pending):
            self._answering = (request, answer)
            answer.then(self._finish)
        else:
            self.task = self._loop.create_task(self._serve(request, answer))
            close_with(self.task, answer)

    def _finish(self, reply: HttpResponse | Exception) -> None:
        """Writes the answer to what `_answering` says."""
        assert self._answering is not None, "a pending reply comes once"
        request, self._answering = self._answering[0], None
        transport = self._transport
        try:
            if isinstance(reply, Exception):
                raise reply
            if transport is not None:
                write_whole(transport, request, reply, is_last=self._is_last())
            if reply.on_sent is not None:
                reply.on_sent()
        except Exception as error:
            _logger.error("HTTP connection failed", exc_info=error)
            self.abort()
        if self._writable is not None:
            self.task = self._loop.create_task(self._wait_and_go_on(self._writable))
        else:
            self._next()

    async def _wait_and_go_on(self, writable: asyncio.Future[None]) -> None:
        await writable
        self.task = None
        self._next()

    async def _serve(self, request: Request, answer: Awaitable[Reply]) -> None:
        try:
            reply = await answer
            try:
                await self._write(request, reply)
            finally:
                if reply.on_sent is not None:
                    reply.on_sent()
        except asyncio.CancelledError:
            if self._transport is None:
                return  # the client has gone; this task is nobody's any more
            raise
        except Exception as error:
            _logger.error("HTTP connection failed", exc_info=error)
            self.abort()
        self.task = None
        self._next()

    async def _write(self, request: Request, reply: Reply) -> None:
        transport = self._transport
        if transport is None:
            return
        if isinstance(reply, HttpStream):
            await self._write_stream(transport, request, reply, self._is_last())
            return
        if isinstance(reply, HttpPush):
            await self._push(transport, request, reply, self._is_last())
            return
        write_whole(transport, request, reply, is_last=self._is_last())
        if self._writable is not None:
            await self._writable

    def _is_last(self) -> bool:
        return (self._close_after and not self._waiting) or self._server.stopping

    async def _write_stream(
        self, transport: asyncio.Transport, request: Request, reply: HttpStream, last: bool
    ) -> None:
        """HTTP/1.0 knows no chunks: there the end of the connection is the end of the answer."""
        old = request.minor_version == 0
        self._close_after = self._close_after or old
        framing = "" if old else "Transfer-Encoding: chunked\r\n"
        transport.write(head_of(reply, framing, request, last or old))
        try:
            async for part in reply.chunks:
                if part:
                    transport.write(bytes(part) if old else chunk_of(part))
                if self._writable is not None:
                    await self._writable
            if not old:
                transport.write(b"0\r\n\r\n")
        finally:
            close = getattr(reply.chunks, "aclose", None)
            if close is not None:
                await close()

    async def _push(self, transport: asyncio.Transport, request: Request, reply: HttpPush, last: bool) -> None:
        old = request.minor_version == 0
        self._close_after = self._close_after or old
        framing = "" if old else "Transfer-Encoding: chunked\r\n"
        transport.write(head_of(reply, framing, request, last or old))
        channel = PushChannel(transport, self._loop, chunked=not old)
        reply.begin(channel)
        try:
            await channel.closed
        except asyncio.CancelledError:
            reply.on_gone()
            raise


def _refuse_large(request: Request, max_body_bytes: int) -> HttpResponse:
    return error_response(too_large(request.body_bytes, max_body_bytes, "request JSON size of"))


def no_answer(request: Request) -> None:
    """The connection just closes."""
