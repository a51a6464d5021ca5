"""A closed loop of unary gRPC calls over bare HTTP/2: so many connections, one call outstanding on each.

Knows as much of HTTP/2 (RFC 9113) as a client that sends one call at a time needs: it doesn't decode answers'
headers, so a call is good if it ended with trailers after as many bytes as the first answer had.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import cast

from tests.bench.load_result import Tally

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW = 65535
_LARGE_WINDOW = 0x7FFFFFFF
_MAX_FRAME = 16384


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _literal(index: bytes, name: bytes, value: bytes) -> bytes:
    """A header that goes into no table, without Huffman coding; `index` names a header of the static table."""
    spelt = index if index else b"\x00" + bytes((len(name),)) + name
    return spelt + bytes((len(value),)) + value


def header_block(authority: str, path: str) -> bytes:
    return (
        b"\x83\x86"  # :method POST, :scheme http
        + _literal(b"\x04", b"", path.encode())
        + _literal(b"\x01", b"", authority.encode())
        + _literal(b"\x0f\x10", b"", b"application/grpc")
        + _literal(b"", b"te", b"trailers")
    )


class GrpcConnection(asyncio.Protocol):
    """Calls again whenever the answer is complete."""

    def __init__(self, headers: bytes, message: bytes, tally: Tally, num_answer_bytes: int) -> None:
        self._headers = headers
        self._body = b"\x00" + struct.pack(">I", len(message)) + message
        self._tally = tally
        self._expected = num_answer_bytes
        self._received = bytearray()
        self._stream = -1
        self._sent_ns = 0
        self._num_bytes = 0
        self._num_unacknowledged = 0
        self._unsent = memoryview(b"")
        self._connection_window = _INITIAL_WINDOW
        self._stream_window = _INITIAL_WINDOW
        self._initial_stream_window = _INITIAL_WINDOW
        self._transport: asyncio.Transport | None = None
        self._on_frame: dict[int, Callable[[int, int, bytes], None]] = {
            _DATA: self._data,
            _HEADERS: self._header,
            _RST_STREAM: self._reset,
            _SETTINGS: self._settings,
            _PING: self._ping,
            _WINDOW_UPDATE: self._window,
        }

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio's by class
        self._transport = cast(asyncio.Transport, transport)
        settings = struct.pack(">HI", 4, _LARGE_WINDOW)  # SETTINGS_INITIAL_WINDOW_SIZE
        widen = _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _LARGE_WINDOW - _INITIAL_WINDOW))
        self._transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + widen)

    def _call(self) -> None:
        self._stream += 2
        self._num_bytes = 0
        self._stream_window = self._initial_stream_window
        self._unsent = memoryview(self._body)
        self._sent_ns = self._tally.now_ns()
        self._send(_frame(_HEADERS, _END_HEADERS, self._stream, self._headers))

    def _send(self, before: bytes = b"") -> None:
        """As much of the body as the windows allow, in one write."""
        parts = [before] if before else []
        while self._unsent.nbytes:
            size = min(self._unsent.nbytes, _MAX_FRAME, self._connection_window, self._stream_window)
            if size <= 0:
                break
            part, self._unsent = self._unsent[:size], self._unsent[size:]
            self._connection_window -= size
            self._stream_window -= size
            flags = 0 if self._unsent.nbytes else _END_STREAM
            parts.append(_frame(_DATA, flags, self._stream, bytes(part)))
        if parts and self._transport is not None:
            self._transport.write(b"".join(parts))

    def data_received(self, data: bytes) -> None:
        self._received += data
        buffer = self._received
        start = 0
        while len(buffer) - start >= 9:
            size = int.from_bytes(buffer[start : start + 3], "big")
            if len(buffer) - start < 9 + size:
                break
            kind, flags = buffer[start + 3], buffer[start + 4]
            stream = int.from_bytes(buffer[start + 5 : start + 9], "big") & _LARGE_WINDOW
            payload = bytes(buffer[start + 9 : start + 9 + size]) if kind != _DATA else b""
            if kind == _DATA:
                self._num_bytes += size
                self._num_unacknowledged += size
            handler = self._on_frame.get(kind)
            if handler is not None:
                handler(flags, stream, payload)
            start += 9 + size
        del buffer[:start]

    def _data(self, flags: int, stream: int, payload: bytes) -> None:
        if self._num_unacknowledged > 1 << 28 and self._transport is not None:
            self._transport.write(_frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", self._num_unacknowledged)))
            self._num_unacknowledged = 0

    def _header(self, flags: int, stream: int, payload: bytes) -> None:
        if flags & _END_STREAM:
            self._ended(self._num_bytes == self._expected)

    def _reset(self, flags: int, stream: int, payload: bytes) -> None:
        self._ended(False)

    def _ended(self, is_good: bool) -> None:
        self._tally.count(self._sent_ns, is_good)
        if self._tally.is_going:
            self._call()
        elif self._transport is not None:
            self._transport.close()

    def _settings(self, flags: int, stream: int, payload: bytes) -> None:
        if flags & _ACK:
            return
        for key, value in struct.iter_unpack(">HI", payload):
            if key == 4:
                self._stream_window += value - self._initial_stream_window
                self._initial_stream_window = value
        assert self._transport is not None
        self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        if self._stream < 0:
            self._call()
        else:
            self._send()

    def _ping(self, flags: int, stream: int, payload: bytes) -> None:
        if not flags & _ACK and self._transport is not None:
            self._transport.write(_frame(_PING, _ACK, 0, payload))

    def _window(self, flags: int, stream: int, payload: bytes) -> None:
        added = int.from_bytes(payload, "big") & _LARGE_WINDOW
        if stream == 0:
            self._connection_window += added
        elif stream == self._stream:
            self._stream_window += added
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if self._tally.is_going:
            self._tally.lose()


async def connect(address: str, path: str, message: bytes, num_answer_bytes: int, tally: Tally) -> None:
    """One more connection. `num_answer_bytes` counts the answer's message and its five bytes of prefix."""
    host, port = address.rsplit(":", 1)
    headers = header_block(address, path)
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: GrpcConnection(headers, message, tally, num_answer_bytes), host, int(port))
