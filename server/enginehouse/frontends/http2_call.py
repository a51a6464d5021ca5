"""One gRPC call on an HTTP/2 stream: messages in, messages out, a status at the end."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from enginehouse.errors import EnginehouseError, Unavailable
from enginehouse.frontends import http2_frames as h2
from enginehouse.frontends.grpc_call import GrpcCall, Method, Unary
from enginehouse.frontends.grpc_call import Stream as StreamFunction
from enginehouse.frontends.http2_frames import literal_header
from enginehouse.frontends.http2_stream import Stream
from enginehouse.frontends.pending import Pending, close_with
from enginehouse.frontends.wire_errors import as_wire_error, grpc_status

DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, UNAUTHENTICATED = 4, 8, 12, 13, 14, 16
MAX_MESSAGE_BYTES = 2**31 - 1
"""What protobuf can parse, and grpcio's bound where none is set."""
_RESPONSE_HEADERS = (
    h2.STATUS_200
    + literal_header(b"content-type", b"application/grpc")
    + literal_header(b"grpc-accept-encoding", b"identity, deflate, gzip")
)
_GZIP_HEADERS = _RESPONSE_HEADERS + literal_header(b"grpc-encoding", b"gzip")
_GZIP_WINDOW_BITS = 16 + zlib.MAX_WBITS
_OK_TRAILERS = literal_header(b"grpc-status", b"0")
_WORTH_NO_COPY_BYTES = 64 << 10
_MAX_UNREAD = 64
"""Messages of a stream that may wait for their reader before the client is held back."""
_logger = logging.getLogger(__name__)

Start: TypeAlias = Callable[[Awaitable[None]], asyncio.Task[None]]
"""Makes a task and holds it until it has ended."""


class Call:
    """One call: messages in, messages out, a status at the end. An http2_stream.StreamHandler."""

    __slots__ = (
        "_decompress", "_ended", "_expiry", "_flag", "_has_begun", "_held_bytes", "_is_stopped", "_messages", "_method",
        "_num_missing", "_parts", "_pending", "_prefix", "_reader", "_sent_headers", "_start", "_stream", "_task",
        "closed", "grpc", "gzip_level",
    )  # fmt: skip

    def __init__(self, start: Start, stream: Stream, grpc: GrpcCall, encoding: bytes) -> None:
        self._start = start
        self._stream = stream
        self.grpc = grpc
        self._decompress = encoding if encoding != b"identity" else b""
        self._prefix = b""
        """What has come of the next message's flag and length."""
        self._flag = 0
        self._num_missing = 0
        """Of the message whose parts come."""
        self._parts: list[bytes] = []
        self._messages: deque[bytes] = deque()
        self._held_bytes = 0
        self._ended = False
        self._is_stopped = False
        self._reader: asyncio.Future[None] | None = None
        self._method: Method | None = None
        self._has_begun = False
        self._pending: Pending[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._sent_headers = False
        self.gzip_level = 0
        """How hard to compress the answers; 0 is not at all."""
        self.closed = False

    def begin(self, method: Method, missing_header: str | None) -> None:
        self._method = method
        if missing_header is not None:
            error = Unavailable(f"This protocol is restricted, expecting header '{missing_header}'")
            self.refuse(grpc_status(error), str(error))
            return
        if self.grpc.deadline_ns:
            left_s = (self.grpc.deadline_ns - self.grpc.received_ns) / 1e9
            self._expiry = asyncio.get_running_loop().call_later(left_s, self._expire)
        if method.stream is not None:
            self._task = self._start(self._run_stream(method.stream))

    # --- what comes

    def on_data(self, data: memoryview) -> None:
        if self.closed:
            return
        if self._is_between and len(data) >= 5 and int.from_bytes(data[1:5], "big") == len(data) - 5:
            self._take_message(data[0], bytes(data[5:]))
        else:
            rest = data
            while len(rest) and not self.closed:
                rest = self._gather(rest)
        # A reader that is behind holds the client back through the window.
        if len(self._messages) < _MAX_UNREAD:
            self._stream.consumed(len(data))
        else:
            self._held_bytes += len(data)

    @property
    def _is_between(self) -> bool:
        """Whether the last message is complete and nothing of the next has come."""
        return not self._num_missing and not self._prefix

    def _gather(self, data: memoryview) -> memoryview:
        """Takes what belongs to the current prefix or message; gives back the rest."""
        if self._num_missing:
            part = data[: self._num_missing]
            self._parts.append(bytes(part))
            self._num_missing -= len(part)
            if not self._num_missing:
                message = b"".join(self._parts)
                self._parts.clear()
                self._take_message(self._flag, message)
            return data[len(part) :]
        part = data[: 5 - len(self._prefix)]
        self._prefix += part
        if len(self._prefix) == 5:
            self._flag, size = self._prefix[0], int.from_bytes(self._prefix[1:], "big")
            self._prefix = b""
            if size > MAX_MESSAGE_BYTES:
                self._refuse_large(size)
            elif size:
                self._num_missing = size
            else:
                self._take_message(self._flag, b"")
        return data[len(part) :]

    def _take_message(self, flag: int, message: bytes) -> None:
        if flag & 1:
            try:
                message = _decompressed(message, self._decompress)
            except (zlib.error, ValueError) as error:
                self.refuse(INTERNAL, f"message can't be decompressed: {error}")
                return
            if len(message) > MAX_MESSAGE_BYTES:
                self._refuse_large(len(message))
                return
        method = self._method
        assert method is not None, "messages of refused calls are dropped before: a bug"
        if method.unary is None:
            self._messages.append(message)
            self._wake()
        elif not self._has_begun:
            self._has_begun = True
            self._begin_unary(method.unary, message)

    def _refuse_large(self, num_bytes: int) -> None:
        self.refuse(RESOURCE_EXHAUSTED, f"Received message larger than max ({num_bytes} vs. {MAX_MESSAGE_BYTES})")

    def on_end(self) -> None:
        self._ended = True
        method = self._method
        if self.closed or method is None:
            return
        if not self._is_between:
            self.refuse(INTERNAL, "the call ended inside a message")
        elif method.unary is not None and not self._has_begun:
            self.refuse(INTERNAL, "the call has no message")
        else:
            self._wake()

    def on_reset(self) -> None:
        self._close()
        self._give_up()

    def on_stop(self) -> None:
        """A stream that its client leaves open ends after the answers to what was read."""
        self._is_stopped = True
        self._wake()

    def _give_up(self) -> None:
        """Nobody waits for what the method is doing."""
        if self._task is not None:
            self._task.cancel()
        if self._pending is not None:
            self._pending.leave()

    def _expire(self) -> None:
        self.refuse(DEADLINE_EXCEEDED, "Deadline Exceeded")

    # --- running the method

    def _begin_unary(self, unary: Unary, message: bytes) -> None:
        try:
            answer = unary(message, self.grpc)
        except Exception as error:
            self._end_with(error)
            return
        if isinstance(answer, Pending):
            self._pending = answer
            answer.then(self._finish_unary)
        else:
            self._task = self._start(self._run_unary(answer))
            close_with(self._task, answer)

    async def _run_unary(self, answer: Awaitable[bytes]) -> None:
        try:
            self._finish_unary(await answer)
        except Exception as error:
            self._finish_unary(error)

    def _finish_unary(self, answer: bytes | Exception) -> None:
        self._pending = None
        if self.grpc.deadline_ns and time.monotonic_ns() >= self.grpc.deadline_ns:
            self._expire()  # its timer may be a millisecond late
        elif isinstance(answer, Exception):
            self._end_with(answer)
        elif not self.closed:
            self._write(answer)
            self._end(_OK_TRAILERS)

    async def _run_stream(self, stream: StreamFunction) -> None:
        try:
            await stream(self._read, self._write_and_wait, self.grpc)
        except Exception as error:
            self._end_with(error)
            return
        if self.closed:
            return
        is_cut = self._is_stopped and not self._ended
        self._end(_trailers(UNAVAILABLE, "Server is stopping") if is_cut else _OK_TRAILERS)

    async def _read(self) -> bytes | None:
        while not self._messages:
            if self._ended or self.closed or self._is_stopped:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self._held_bytes and len(self._messages) <= _MAX_UNREAD // 2:
            self._stream.consumed(self._held_bytes)
            self._held_bytes = 0
        return self._messages.popleft()

    async def _write_and_wait(self, message: bytes) -> None:
        if not self.closed:
            self._write(message)
            if self._stream.num_blocked or not self._stream.connection.writable:
                await self._stream.drained()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # --- what goes

    def _write(self, message: bytes) -> None:
        if not self._sent_headers:
            self._sent_headers = True
            self._stream.send_headers(_GZIP_HEADERS if self.gzip_level else _RESPONSE_HEADERS)
        flag = b"\x00"
        if self.gzip_level:
            packed = zlib.compress(message, self.gzip_level, _GZIP_WINDOW_BITS)
            if len(packed) < len(message):
                flag, message = b"\x01", packed
        prefix = flag + len(message).to_bytes(4, "big")
        if len(message) < _WORTH_NO_COPY_BYTES:
            self._stream.send_data(prefix + message)
        else:
            self._stream.send_data(prefix)
            self._stream.send_data(message)

    def _end(self, trailers: bytes) -> None:
        self._close()
        block = trailers if self._sent_headers else _RESPONSE_HEADERS + trailers
        self._stream.send_headers(block, end=True)

    def _end_with(self, error: Exception) -> None:
        if self.closed:
            return
        if not isinstance(error, EnginehouseError):
            _logger.error("gRPC method failed", exc_info=error)
        told = as_wire_error(error)
        self._end(_trailers(grpc_status(told), str(told)))

    def refuse(self, status: int, message: str) -> None:
        """Ends the call with that status, whatever its method is doing."""
        if self.closed:
            return
        self._end(_trailers(status, message))
        self._give_up()

    def _close(self) -> None:
        self.closed = True
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._wake()


def _trailers(status: int, message: str) -> bytes:
    block = literal_header(b"grpc-status", str(status).encode())
    if message:
        block += literal_header(b"grpc-message", _percent_encoded(message))
    return block


def _percent_encoded(message: str) -> bytes:
    raw = message.encode("utf-8", "replace")
    return b"".join(
        bytes((byte,)) if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte for byte in raw
    )


def _decompressed(message: bytes, encoding: bytes) -> bytes:
    if not encoding:
        raise ValueError("it is marked as compressed and the call names no encoding")
    inflater = zlib.decompressobj(_GZIP_WINDOW_BITS if encoding == b"gzip" else zlib.MAX_WBITS)
    # One byte more than the bound tells that it was passed, without making the rest.
    data = inflater.decompress(message, MAX_MESSAGE_BYTES + 1)
    if not inflater.eof and len(data) <= MAX_MESSAGE_BYTES:
        raise ValueError("it is cut off")
    return data
