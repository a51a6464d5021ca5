"""HTTP/1.1 under the handlers: aiohttp's low-level server, its requests and answers as bytes.

Answers what the protocol itself gets wrong as Triton does: an unknown method 405, other broken requests by
closing the connection. A client that leaves cancels its handler.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, TypeAlias

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from enginehouse.errors import InvalidArgument, Unavailable
from enginehouse.frontends.compression import too_large
from enginehouse.frontends.http_message import (
    Buffer,
    HttpRequest,
    HttpResponse,
    HttpStream,
    Reply,
    error_response,
    method_not_allowed,
)

Handle: TypeAlias = Callable[[HttpRequest], Awaitable[Reply]]

MAX_CHUNKS = 65536
_REASONS = {status.value: status.phrase for status in HTTPStatus}
_REQUEST_LINE = re.compile(rb"[!-~]+ [!-~]+ HTTP/1\.[01]\r?\n")
_ABSOLUTE = re.compile(r"https?://[^/?#]*", re.IGNORECASE)
_logger = logging.getLogger(__name__)


class AiohttpServer:
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
    ) -> None:
        """`name` is for messages; `max_body_bytes` 0 is no limit; port 0 asks for a free one."""
        self._handle = handle
        self._name = name
        self._address = address
        self.port = port
        self._max_body_bytes = max_body_bytes
        self._reuse_port = reuse_port
        self._server: web.Server | None = None
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises Unavailable if the address is taken."""
        loop = asyncio.get_running_loop()
        self._server = _Server(
            self._serve,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            max_line_size=65536,
            max_field_size=65536,
            lingering_time=0,
        )
        try:
            self._listener = await loop.create_server(
                self._server, self._address, self.port, reuse_port=self._reuse_port or None, backlog=1024
            )
        except OSError as error:
            raise Unavailable(
                f"failed to start {self._name} service: Unavailable - Socket '{self._address}:{self.port}' "
                f"already in use ({error.strerror})"
            ) from None
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self, grace_s: float = 5.0) -> None:
        """Takes no new connections, lets requests in flight end, then closes."""
        if self._listener is not None:
            self._listener.close()
        if self._server is not None:
            self._server.pre_shutdown()
            await self._server.shutdown(grace_s)

    async def _serve(self, request: web.BaseRequest) -> Any:
        received_ns = time.monotonic_ns()
        if request.headers.get("Expect", "").lower() == "100-continue":
            assert request.transport is not None
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        path, _, query = _target(request).partition("?")
        try:
            body = await self._read(request) if request.can_read_body else b""
        except InvalidArgument as error:
            return _Answer(error_response(error), keep_alive=False)
        reply = await self._handle(
            HttpRequest(request.method, path, query, request.headers, body, received_ns)
        )
        return _Answer(reply, request.keep_alive)

    async def _read(self, request: web.BaseRequest) -> Buffer:
        limit = self._max_body_bytes
        length = request.content_length
        if length is not None:
            if limit and length > limit:
                raise too_large(length, limit, "request JSON size of")
            return await request.content.read()
        body = bytearray()
        num_chunks = 0
        async for part, ends_chunk in request.content.iter_chunks():
            body += part
            num_chunks += ends_chunk
            if limit and len(body) > limit:
                raise too_large(len(body), limit, "request JSON size of")
            if num_chunks > MAX_CHUNKS:
                raise InvalidArgument(
                    f"Chunked request body exceeds maximum of {MAX_CHUNKS} non-empty chunks"
                )
        return bytes(body)


def _target(request: web.BaseRequest) -> str:
    """The path as it was sent; percent signs stay."""
    target = request._message.path
    if target.startswith("/"):
        return target
    return _ABSOLUTE.sub("", target, count=1) or "/"


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    """Remembers the bytes that came last, to tell an unknown method from garbage."""

    _last_data = b""

    def data_received(self, data: bytes) -> None:
        self._last_data = data
        super().data_received(data)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> Any:
        if status == 400 and _REQUEST_LINE.match(self._last_data) and "method" in (message or "").lower():
            return _Answer(method_not_allowed(), keep_alive=False)
        if status >= 500:
            _logger.error("HTTP connection failed", exc_info=exc)
        return _Silence()


class _Silence:
    """The answer to what is no HTTP: the connection closes."""

    keep_alive = False
    status = 0

    async def prepare(self, request: web.BaseRequest) -> None:
        pass

    async def write_eof(self) -> None:
        pass


class _Answer:
    """What aiohttp calls a response: writes itself to the connection."""

    def __init__(self, reply: Reply, keep_alive: bool | None) -> None:
        self._reply = reply
        self.keep_alive = bool(keep_alive)
        self.status = reply.status

    async def prepare(self, request: web.BaseRequest) -> None:
        reply = self._reply
        transport, protocol = request.transport, request.protocol
        if transport is None:
            raise ConnectionResetError
        version = request.version
        old = version.major == 1 and version.minor == 0
        if isinstance(reply, HttpStream):
            await self._stream(reply, transport, protocol, old)
            return
        size = sum(memoryview(part).nbytes for part in reply.body)
        chunked = reply.chunked and not old
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        head = self._head(reply, framing, old)
        if request.method == "HEAD":
            transport.write(head)
        elif chunked:
            chunks = [_chunk(part) for part in reply.body if len(part)]
            transport.write(b"".join((head, *chunks, b"0\r\n\r\n")))
        elif size < 65536:
            transport.write(b"".join((head, *reply.body)))
        else:
            transport.writelines((head, *reply.body))
            await protocol._drain_helper()

    def _head(self, reply: HttpResponse | HttpStream, framing: str, old: bool) -> bytes:
        lines = [f"HTTP/1.1 {reply.status} {_REASONS.get(reply.status, '')}", framing]
        if reply.content_type:
            lines.append(f"Content-Type: {reply.content_type}")
        lines.extend(f"{name}: {value}" for name, value in reply.headers)
        if not self.keep_alive:
            lines.append("Connection: close")
        elif old:
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    async def _stream(
        self, reply: HttpStream, transport: asyncio.Transport, protocol: RequestHandler, old: bool
    ) -> None:
        """HTTP/1.0 knows no chunks: there the end of the connection is the end of the answer."""
        if old:
            self.keep_alive = False
        framing = "Cache-Control: no-cache" if old else "Transfer-Encoding: chunked"
        transport.write(self._head(reply, framing, old))
        try:
            async for part in reply.chunks:
                if transport.is_closing():
                    raise ConnectionResetError
                transport.write(bytes(part) if old else _chunk(part))
                await protocol._drain_helper()
            if not old:
                transport.write(b"0\r\n\r\n")
        finally:
            close = getattr(reply.chunks, "aclose", None)
            if close is not None:
                await close()

    async def write_eof(self) -> None:
        pass


def _chunk(part: Buffer) -> bytes:
    return b"%x\r\n%b\r\n" % (len(part), bytes(part))
