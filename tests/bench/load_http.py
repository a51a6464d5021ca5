"""A closed loop of HTTP requests: so many connections, one request outstanding on each.

Its own asyncio protocol with the bytes made once costs some 15 us a request, a third of an HTTP library's, so
that the client disturbs the server as little as a client in Python can.
"""

from __future__ import annotations

import asyncio
from typing import cast
from urllib.parse import urlsplit

from tests.bench.load_result import Tally


class HttpConnection(asyncio.Protocol):
    """Sends the request again whenever its answer is complete."""

    def __init__(self, request: bytes, tally: Tally) -> None:
        self._request = request
        self._tally = tally
        self._received = bytearray()
        self._needed = -1
        self._is_good = False
        self._sent_ns = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio's by class
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        assert self._transport is not None
        self._sent_ns = self._tally.now_ns()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._needed < 0 and not self._read_head():
            return
        if len(self._received) < self._needed:
            return
        self._tally.count(self._sent_ns, self._is_good)
        self._received.clear()
        self._needed = -1
        if self._tally.is_going:
            self._send()
        elif self._transport is not None:
            self._transport.close()

    def _read_head(self) -> bool:
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._received[:end]).lower()
        self._is_good = head[9:12] == b"200"
        start = head.find(b"\r\ncontent-length:")  # not the one that ends "inference-header-content-length"
        if start < 0:
            raise ValueError("an answer without Content-Length")
        self._needed = end + 4 + int(head[start + 17 :].split(b"\r\n", 1)[0])
        return True

    def connection_lost(self, error: Exception | None) -> None:
        if self._tally.is_going:
            self._tally.lose()


async def connect(url: str, body: bytes, headers: dict[str, str], tally: Tally) -> None:
    """One more connection that sends `body` in a loop until the tally ends."""
    parts = urlsplit(url)
    assert parts.hostname is not None, "a URL with host and port"
    assert parts.port is not None, "a URL with host and port"
    lines = {"Host": parts.netloc, "Content-Length": str(len(body)), **headers}
    head = f"POST {parts.path} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines.items())
    request = head.encode() + b"\r\n" + body
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: HttpConnection(request, tally), parts.hostname, parts.port)
