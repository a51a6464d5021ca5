"""One HTTP/2 connection of a server: frames in, streams out, flow control both ways.

Knows no gRPC: what a stream carries is its `StreamHandler`'s affair. Frames of one turn of the loop are written
together. Built instead of taken from a library because there is none for asyncio whose cost a request is a
small part of ours (docs/benchmarks.md); header compression is hpack's.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import cast

import hpack

from enginehouse.frontends import http2_frames as h2
from enginehouse.frontends.http2_frames import FrameType, Http2Code, ProtocolError, Setting
from enginehouse.frontends.http2_keeping import KeepAlive, Keeper
from enginehouse.frontends.http2_stream import OUR_WINDOW_BYTES, Stream, StreamHandler

OUR_CONNECTION_WINDOW_BYTES = 64 << 20
OUR_MAX_FRAME_BYTES = 1 << 20
MAX_HEADER_BLOCK_BYTES = 64 << 10
MAX_UNREAD_ACKS = 1000
_JOIN_BYTES = 64 << 10
_LENGTH = struct.Struct(">I")
_logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]


class Http2Connection(asyncio.Protocol):
    """See module. `open_stream` makes the handler of a new stream from its headers."""

    def __init__(
        self,
        open_stream: Callable[[Stream, Headers, bool], StreamHandler],
        on_closed: Callable[[Http2Connection], None],
        loop: asyncio.AbstractEventLoop,
        keep_alive: KeepAlive,
    ) -> None:
        self._open_stream = open_stream
        self._on_closed = on_closed
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._greeted = False
        self._decoder = hpack.Decoder()
        self._known_blocks: dict[bytes, Headers] = {}
        self._header_block: tuple[int, int, bytearray] | None = None
        self._out: list[bytes | memoryview] = []
        self._flush_scheduled = False
        self._initial_window = h2.DEFAULT_WINDOW_BYTES
        self._last_stream_id = 0
        self._received = 0
        self._num_unread_acks = 0
        self._keeper = Keeper(self, keep_alive, loop)
        self.num_written = 0
        self.streams: dict[int, Stream] = {}
        self.blocked: set[Stream] = set()
        self.waiting: set[Stream] = set()
        self.may_send = h2.DEFAULT_WINDOW_BYTES
        self.max_frame_bytes = h2.DEFAULT_MAX_FRAME_BYTES
        self.writable = True
        self.closed = False
        self.stopping = False

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.send(
            h2.settings(
                {
                    Setting.INITIAL_WINDOW_SIZE: OUR_WINDOW_BYTES,
                    Setting.MAX_FRAME_SIZE: OUR_MAX_FRAME_BYTES,
                    Setting.MAX_HEADER_LIST_SIZE: MAX_HEADER_BLOCK_BYTES,
                }
            )
        )
        self.send(h2.window_update(0, OUR_CONNECTION_WINDOW_BYTES - h2.DEFAULT_WINDOW_BYTES))

    def data_received(self, data: bytes) -> None:
        self._keeper.last_heard_s = self._loop.time()
        buffer = self._buffer
        buffer += data
        try:
            used = self._take(buffer)
        except ProtocolError as error:
            self._fail(error)
            return
        if used:
            del buffer[:used]

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exception: Exception | None) -> None:
        self.closed = True
        self._keeper.close()
        self._out.clear()
        streams, self.streams = list(self.streams.values()), {}
        for stream in streams:
            stream.drop()
            if stream.handler is not None:
                stream.handler.on_reset()
        for stream in list(self.waiting):
            stream.wake_if_drained()
        self._on_closed(self)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        for stream in list(self.waiting):
            stream.wake_if_drained()

    # --- sending

    def send(self, data: bytes | memoryview) -> None:
        self._out.append(data)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        out, self._out = self._out, []
        if self.closed or self._transport is None:
            return
        # Small pieces in one write; large ones as they are, without a copy.
        start = size = 0
        for index, piece in enumerate(out):
            if len(piece) >= _JOIN_BYTES:
                if index > start:
                    self._transport.write(b"".join(out[start:index]))
                self._transport.write(piece)
                start, size = index + 1, 0
            else:
                size += len(piece)
        if start < len(out):
            self._transport.write(b"".join(out[start:]))

    def finished(self, stream: Stream) -> None:
        """Our end of the stream is closed and all of it sent."""
        if not stream.remote_ended:
            self.send(h2.rst_stream(stream.id, Http2Code.NO_ERROR))
        self.forget(stream)

    def forget(self, stream: Stream) -> None:
        self.streams.pop(stream.id, None)
        self.blocked.discard(stream)
        if self.stopping and not self.streams:
            self._close()

    @property
    def has_calls(self) -> bool:
        return bool(self.streams)

    def ping(self) -> None:
        self.send(h2.frame(FrameType.PING, 0, 0, b"alive?\0\0"))

    def retire(self) -> None:
        """Takes no new streams; closes when those that are open have ended."""
        if not self.stopping and not self.closed:
            self.stopping = True
            self.send(h2.goaway(self._last_stream_id, Http2Code.NO_ERROR))
            if not self.streams:
                self._close()

    def stop(self) -> None:
        """The server stops: as `retire`, and streams that clients would leave open end, too."""
        self.retire()
        for stream in list(self.streams.values()):
            if stream.handler is not None:
                stream.handler.on_stop()

    def abort(self) -> None:
        if self._transport is not None and not self.closed:
            self._transport.abort()

    def _close(self) -> None:
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _fail(self, error: ProtocolError) -> None:
        _logger.debug("HTTP/2 connection ended: %s", error)
        self.send(h2.goaway(self._last_stream_id, error.code, str(error)))
        self._close()

    # --- receiving

    def _take(self, buffer: bytearray) -> int:
        """Handles all whole frames; how many bytes of the buffer they were."""
        used = 0
        if not self._greeted:
            if len(buffer) < len(h2.PREFACE):
                if not h2.PREFACE.startswith(buffer):
                    raise ProtocolError(Http2Code.PROTOCOL_ERROR, "this port speaks gRPC (HTTP/2) only")
                return 0
            if not buffer.startswith(h2.PREFACE):
                raise ProtocolError(Http2Code.PROTOCOL_ERROR, "this port speaks gRPC (HTTP/2) only")
            self._greeted = True
            used = len(h2.PREFACE)
        end = len(buffer)
        with memoryview(buffer) as view:
            while end - used >= h2.FRAME_HEADER_BYTES:
                size = (view[used] << 16) | (view[used + 1] << 8) | view[used + 2]
                if size > OUR_MAX_FRAME_BYTES:
                    raise ProtocolError(Http2Code.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
                start = used + h2.FRAME_HEADER_BYTES
                if end - start < size:
                    break
                stream_id = _LENGTH.unpack_from(view, used + 5)[0] & 0x7FFFFFFF
                with view[start : start + size] as payload:
                    self._handle(view[used + 3], view[used + 4], stream_id, payload)
                used = start + size
        return used

    def _handle(self, kind: int, flags: int, stream_id: int, payload: memoryview) -> None:
        if self._header_block is not None and kind != FrameType.CONTINUATION:
            raise ProtocolError(Http2Code.PROTOCOL_ERROR, "headers were interrupted by another frame")
        if kind == FrameType.DATA:
            self._take_data(flags, stream_id, payload)
        elif kind == FrameType.HEADERS:
            self._begin_headers(flags, stream_id, payload)
        elif kind == FrameType.WINDOW_UPDATE:
            self._open_window(stream_id, payload)
        elif kind == FrameType.RST_STREAM:
            self._take_reset(stream_id)
        elif kind == FrameType.PING:
            if len(payload) != 8:
                raise ProtocolError(Http2Code.FRAME_SIZE_ERROR, "PING of a wrong length")
            if not flags & h2.ACK:
                if not self._keeper.may_ping():
                    raise ProtocolError(Http2Code.ENHANCE_YOUR_CALM, "too_many_pings")
                self._acknowledge(h2.frame(FrameType.PING, h2.ACK, 0, bytes(payload)))
        elif kind == FrameType.SETTINGS:
            if not flags & h2.ACK:
                self._take_settings(bytes(payload))
        elif kind == FrameType.CONTINUATION:
            self._continue_headers(flags, stream_id, payload)
        # PRIORITY, GOAWAY, PUSH_PROMISE and unknown kinds ask nothing of a server

    def _take_data(self, flags: int, stream_id: int, payload: memoryview) -> None:
        size = len(payload)
        self._received += size
        if self._received >= OUR_CONNECTION_WINDOW_BYTES // 2:
            self.send(h2.window_update(0, self._received))
            self._received = 0
        stream = self.streams.get(stream_id)
        if stream is None or stream.handler is None:
            if stream_id > self._last_stream_id or stream_id == 0:
                raise ProtocolError(Http2Code.PROTOCOL_ERROR, "data on a stream that was never opened")
            return  # already answered: what is still under way has no reader
        if stream.remote_ended:
            stream.handler.on_reset()
            stream.reset(Http2Code.STREAM_CLOSED)
            return
        if flags & h2.PADDED:
            with h2.unpadded(payload, flags & h2.PADDED) as data:
                stream.handler.on_data(data)
                stream.consumed(size - len(data))
        elif size:
            stream.handler.on_data(payload)
        if flags & h2.END_STREAM:
            stream.remote_ended = True
            stream.handler.on_end()

    def _begin_headers(self, flags: int, stream_id: int, payload: memoryview) -> None:
        block = h2.unpadded(payload, flags) if flags & (h2.PADDED | h2.PRIORITY_FLAG) else payload
        if flags & h2.END_HEADERS:
            self._take_headers(flags, stream_id, bytes(block))
        else:
            self._header_block = (stream_id, flags, bytearray(block))

    def _continue_headers(self, flags: int, stream_id: int, payload: memoryview) -> None:
        if self._header_block is None or self._header_block[0] != stream_id:
            raise ProtocolError(Http2Code.PROTOCOL_ERROR, "CONTINUATION without headers to continue")
        _, first_flags, block = self._header_block
        block += payload
        if len(block) > MAX_HEADER_BLOCK_BYTES:
            raise ProtocolError(Http2Code.ENHANCE_YOUR_CALM, "headers are too large")
        if flags & h2.END_HEADERS:
            self._header_block = None
            self._take_headers(first_flags, stream_id, bytes(block))

    def _take_headers(self, flags: int, stream_id: int, block: bytes) -> None:
        headers = self._decode(block)
        ends = bool(flags & h2.END_STREAM)
        stream = self.streams.get(stream_id)
        if stream is not None:  # trailers
            if ends and not stream.remote_ended and stream.handler is not None:
                stream.remote_ended = True
                stream.handler.on_end()
            return
        if stream_id % 2 == 0:
            raise ProtocolError(Http2Code.PROTOCOL_ERROR, "a client's streams have odd numbers")
        if stream_id <= self._last_stream_id:
            return  # trailers of a stream that was answered already
        self._last_stream_id = stream_id
        if self.stopping:
            self.send(h2.rst_stream(stream_id, Http2Code.REFUSED_STREAM))
            return
        stream = self.streams[stream_id] = Stream(self, stream_id, self._initial_window)
        stream.remote_ended = ends
        stream.handler = self._open_stream(stream, headers, ends)

    def _decode(self, block: bytes) -> Headers:
        """A block that only points into the table means the same until the table changes."""
        known = self._known_blocks.get(block)
        if known is not None:
            return known
        table = self._decoder.header_table.dynamic_entries
        before = (len(table), table[0] if table else None)
        try:
            headers = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except hpack.HPACKError as error:
            raise ProtocolError(Http2Code.COMPRESSION_ERROR, f"headers can't be decoded: {error}") from None
        table = self._decoder.header_table.dynamic_entries
        if (len(table), table[0] if table else None) != before:
            self._known_blocks.clear()
        elif len(self._known_blocks) < 64:
            self._known_blocks[block] = headers
        return headers

    def _open_window(self, stream_id: int, payload: memoryview) -> None:
        if len(payload) != 4:
            raise ProtocolError(Http2Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE of a wrong length")
        added = _LENGTH.unpack(payload)[0] & 0x7FFFFFFF
        if stream_id == 0:
            self.may_send += added
            if self.may_send > h2.MAX_WINDOW_BYTES:
                raise ProtocolError(Http2Code.FLOW_CONTROL_ERROR, "the connection's window is too large")
            for stream in list(self.blocked):
                stream.send_blocked()
            return
        stream_ = self.streams.get(stream_id)
        if stream_ is None:
            return
        stream_.may_send += added
        if stream_.may_send > h2.MAX_WINDOW_BYTES:
            if stream_.handler is not None:
                stream_.handler.on_reset()
            stream_.reset(Http2Code.FLOW_CONTROL_ERROR)
        elif stream_.num_blocked or stream_ in self.blocked:
            stream_.send_blocked()

    def _take_reset(self, stream_id: int) -> None:
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.drop()
            self.forget(stream)
            if stream.handler is not None:
                stream.handler.on_reset()

    def _take_settings(self, payload: bytes) -> None:
        for key, value in h2.parse_settings(payload):
            if key == Setting.INITIAL_WINDOW_SIZE:
                if value > h2.MAX_WINDOW_BYTES:
                    raise ProtocolError(Http2Code.FLOW_CONTROL_ERROR, "the initial window is too large")
                change, self._initial_window = value - self._initial_window, value
                for stream in self.streams.values():
                    stream.may_send += change
            elif key == Setting.MAX_FRAME_SIZE:
                if not h2.DEFAULT_MAX_FRAME_BYTES <= value < 1 << 24:
                    raise ProtocolError(Http2Code.PROTOCOL_ERROR, f"a largest frame of {value} bytes")
                self.max_frame_bytes = value
        # First this: until it is there, the client holds us to what held before.
        self._acknowledge(h2.frame(FrameType.SETTINGS, h2.ACK, 0))
        for stream in list(self.blocked):
            stream.send_blocked()

    def _acknowledge(self, frame: bytes) -> None:
        """Refuses a client that asks on and on and reads no answer."""
        self._num_unread_acks = 0 if self.writable else self._num_unread_acks + 1
        if self._num_unread_acks > MAX_UNREAD_ACKS:
            raise ProtocolError(Http2Code.ENHANCE_YOUR_CALM, "too many frames whose answers are not read")
        self.send(frame)
