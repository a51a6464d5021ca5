"""Answers as HTTP/1.1 bytes: heads, whole bodies, chunks."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from enginehouse.frontends.http1 import Request
from enginehouse.frontends.http_message import Buffer, HttpResponse, Reply

_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n" for s in HTTPStatus}
_JOIN_LIMIT_BYTES = 65536


def write_whole(transport: asyncio.Transport, request: Request, reply: HttpResponse, *, is_last: bool) -> None:
    """`is_last`: the connection closes after it."""
    size = 0
    for part in reply.body:
        size += len(part)
    chunked = reply.chunked and request.minor_version == 1
    framing = "Transfer-Encoding: chunked\r\n" if chunked else f"Content-Length: {size}\r\n"
    head = head_of(reply, framing, request, is_last)
    if request.method == "HEAD":
        transport.write(head)
    elif chunked:
        transport.write(b"".join((head, *map(chunk_of, filter(len, reply.body)), b"0\r\n\r\n")))
    elif size <= _JOIN_LIMIT_BYTES:
        transport.write(b"".join((head, *reply.body)))
    else:
        transport.writelines((head, *reply.body))


class PushChannel:
    """http_message.Channel over a transport."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, *, chunked: bool) -> None:
        self._transport = transport
        self._chunked = chunked
        self.closed: asyncio.Future[None] = loop.create_future()

    @property
    def num_waiting_bytes(self) -> int:
        return 0 if self._transport.is_closing() else self._transport.get_write_buffer_size()

    def send(self, data: bytes) -> None:
        if not self._transport.is_closing():  # writing to one that is raises, before anyone is told that it is gone
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def close(self) -> None:
        if not self.closed.done():
            if self._chunked and not self._transport.is_closing():
                self._transport.write(b"0\r\n\r\n")
            self.closed.set_result(None)


def head_of(reply: Reply, framing: str, request: Request, is_last: bool) -> bytes:
    text = _STATUS_LINES.get(reply.status) or f"HTTP/1.1 {reply.status} \r\n"
    text += framing
    if reply.content_type:
        text += f"Content-Type: {reply.content_type}\r\n"
    for name, value in reply.headers:
        text += f"{name}: {value}\r\n"
    if is_last:
        text += "Connection: close\r\n"
    elif request.minor_version == 0:
        text += "Connection: keep-alive\r\n"
    return (text + "\r\n").encode("latin-1", "replace")


def chunk_of(part: Buffer) -> bytes:
    return b"%x\r\n%b\r\n" % (len(part), bytes(part))
