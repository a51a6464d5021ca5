"""One stream of an HTTP/2 connection: what is still to be sent on it, and how much may be (RFC 9113, 5.2)."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from enginehouse.frontends import http2_frames as h2
from enginehouse.frontends.http2_frames import FrameType, Http2Code

OUR_WINDOW_BYTES = 4 << 20
"""What a client may send on a stream before we take it in."""


class Sender(Protocol):
    """The connection, as its streams see it."""

    may_send: int
    num_written: int
    max_frame_bytes: int
    writable: bool
    closed: bool
    blocked: set[Stream]
    waiting: set[Stream]

    def send(self, data: bytes | memoryview) -> None: ...
    def finished(self, stream: Stream) -> None:
        """Our end of the stream is closed and all of it sent."""
        ...

    def forget(self, stream: Stream) -> None: ...


class StreamHandler(Protocol):
    """Gets what comes on one stream. Nothing is called after `on_reset`."""

    def on_data(self, data: memoryview) -> None: ...
    def on_end(self) -> None:
        """The client sends no more."""
        ...

    def on_reset(self) -> None:
        """The client, or the connection, gave the stream up."""
        ...

    def on_stop(self) -> None:
        """The server stops: nothing new is begun, what was begun ends."""
        ...


class Stream:
    """The server's end of one stream: what is still to be sent, and how much may be."""

    __slots__ = (
        "_blocked", "_drained", "_taken", "connection", "handler", "id", "is_sent", "may_send", "num_blocked",
        "remote_ended",
    )  # fmt: skip

    def __init__(self, connection: Sender, stream_id: int, window: int) -> None:
        self.connection = connection
        self.id = stream_id
        self.handler: StreamHandler | None = None
        self.may_send = window
        self.num_blocked = 0
        """Bytes that wait for the client's window."""
        self.remote_ended = False
        self.is_sent = False
        """Whether our end is closed."""
        self._blocked: deque[bytes | memoryview] = deque()
        self._drained: asyncio.Future[None] | None = None
        self._taken = 0
        """Bytes taken in that the client has not been told of."""

    def send_headers(self, block: bytes, end: bool = False) -> None:
        """A block made by `http2_frames.literal_header`. Waits behind data that is still blocked."""
        self.connection.num_written += 1
        data = h2.frame(FrameType.HEADERS, h2.END_HEADERS | (h2.END_STREAM if end else 0), self.id, block)
        if self._blocked:
            self._blocked.append(data)
        else:
            self.connection.send(data)
        if end:
            self.is_sent = True
            if not self._blocked:
                self.connection.finished(self)

    def send_data(self, data: bytes) -> None:
        """As much as the windows allow now, the rest as they open."""
        connection = self.connection
        connection.num_written += 1
        size = len(data)
        if not self._blocked and size <= self.may_send and size <= connection.may_send:
            self.may_send -= size
            connection.may_send -= size
            limit = connection.max_frame_bytes
            if size <= limit:
                connection.send(h2.frame_header(FrameType.DATA, 0, self.id, size))
                connection.send(data)
                return
            view = memoryview(data)
            for start in range(0, size, limit):
                part = view[start : start + limit]
                connection.send(h2.frame_header(FrameType.DATA, 0, self.id, len(part)))
                connection.send(part)
            return
        self._blocked.append(memoryview(data))
        self.num_blocked += size
        connection.blocked.add(self)
        self.send_blocked()

    def send_blocked(self) -> None:
        """Called when a window has opened."""
        connection, blocked = self.connection, self._blocked
        while blocked:
            item = blocked[0]
            if isinstance(item, bytes):  # headers: not subject to flow control
                connection.send(item)
                blocked.popleft()
                continue
            size = min(len(item), self.may_send, connection.may_send, connection.max_frame_bytes)
            if size <= 0 and len(item):
                return
            self.may_send -= size
            connection.may_send -= size
            self.num_blocked -= size
            connection.send(h2.frame_header(FrameType.DATA, 0, self.id, size))
            connection.send(item[:size])
            if size == len(item):
                blocked.popleft()
            else:
                blocked[0] = item[size:]
        connection.blocked.discard(self)
        self._wake()
        if self.is_sent:
            connection.finished(self)

    async def drained(self) -> None:
        """Returns when all has been handed to the socket and the socket takes more."""
        while self.num_blocked or not self.connection.writable:
            if self.connection.closed:
                return
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
                self.connection.waiting.add(self)
            await self._drained

    def wake_if_drained(self) -> None:
        if not self.num_blocked or self.connection.closed:
            self._wake()

    def _wake(self) -> None:
        if self._drained is not None and self.connection.writable:
            waiter, self._drained = self._drained, None
            self.connection.waiting.discard(self)
            if not waiter.done():
                waiter.set_result(None)

    def reset(self, code: Http2Code) -> None:
        """Gives the stream up from our side."""
        self.drop()
        self.is_sent = True
        self.connection.send(h2.rst_stream(self.id, code))
        self.connection.forget(self)

    def drop(self) -> None:
        """Nobody takes what is still to be sent."""
        self._blocked.clear()
        self.num_blocked = 0

    def consumed(self, num_bytes: int) -> None:
        """Lets the client send as much again; told when it has come to a part of the window."""
        self._taken += num_bytes
        if self._taken >= OUR_WINDOW_BYTES // 4 and not self.remote_ended:
            self.connection.send(h2.window_update(self.id, self._taken))
            self._taken = 0
