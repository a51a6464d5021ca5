"""Our HTTP/2 server on a transport that is a list: what it answers to which frames, and what it refuses."""

from __future__ import annotations

import asyncio
import gzip
import struct
from collections.abc import Callable
from typing import Any, cast

import hpack
import pytest

from enginehouse.frontends import http2_frames as h2
from enginehouse.frontends.grpc_call import GrpcCall, Method
from enginehouse.frontends.http2_call import MAX_MESSAGE_BYTES
from enginehouse.frontends.http2_connection import MAX_UNREAD_ACKS, Http2Connection
from enginehouse.frontends.http2_frames import FrameType, Http2Code, literal_header
from enginehouse.frontends.http2_transport import Http2GrpcServer
from enginehouse.frontends.restricted_apis import Api
from enginehouse.options import CompressionLevel, ServerOptions

Frame = tuple[int, int, int, bytes]


class Wire:
    """The client's end of one connection: `send` frames, see what came back."""

    def __init__(self, methods: dict[str, Method], options: ServerOptions | None = None) -> None:
        server = Http2GrpcServer(methods, options or ServerOptions())
        loop = asyncio.get_running_loop()
        self.connection = Http2Connection(server._calls.open, lambda gone: None, loop, server._keep_alive)
        self._out = bytearray()
        self.is_closed = False
        self._decoder = hpack.Decoder()
        self.connection.connection_made(cast(asyncio.BaseTransport, self))
        self.connection.data_received(h2.PREFACE + h2.settings({}))

    def write(self, data: bytes) -> None:
        self._out += data

    def close(self) -> None:
        self.is_closed = True

    def send(self, *frames: bytes) -> None:
        self.connection.data_received(b"".join(frames))

    async def frames(self) -> list[Frame]:
        for _ in range(5):
            await asyncio.sleep(0)
        found, at = [], 0
        while at < len(self._out):
            high, low, kind, flags, stream_id = struct.unpack_from(">BHBBI", self._out, at)
            size = high << 16 | low
            found.append((kind, flags, stream_id, bytes(self._out[at + 9 : at + 9 + size])))
            at += 9 + size
        self._out.clear()
        return found

    async def answer(self, stream_id: int = 1) -> tuple[bytes, dict[str, str]]:
        """Data and headers of a whole answer."""
        data = b""
        fields: dict[str, str] = {}
        for kind, _, stream, payload in await self.frames():
            if stream == stream_id and kind == FrameType.DATA:
                data += payload
            elif stream == stream_id and kind == FrameType.HEADERS:
                fields |= {str(name): str(value) for name, value in self._decoder.decode(payload)}
        return data, fields

    async def goaway_code(self) -> Http2Code:
        [payload] = [payload for kind, _, _, payload in await self.frames() if kind == FrameType.GOAWAY]
        assert self.is_closed
        return Http2Code(struct.unpack_from(">I", payload, 4)[0])


async def echo(message: bytes, call: GrpcCall) -> bytes:
    return message


async def big(message: bytes, call: GrpcCall) -> bytes:
    return bytes(int(message))


METHODS = {"/echo": Method(None, echo), "/big": Method(None, big)}


def headers(path: str, stream_id: int = 1, **more: str) -> bytes:
    fields = {":method": "POST", ":path": path, "content-type": "application/grpc", **more}
    block = b"".join(literal_header(name.replace("_", "-").encode(), text.encode()) for name, text in fields.items())
    return h2.frame(FrameType.HEADERS, h2.END_HEADERS, stream_id, block)


def data(payload: bytes, stream_id: int = 1, flags: int = h2.END_STREAM) -> bytes:
    return h2.frame(FrameType.DATA, flags, stream_id, payload)


def message(text: bytes, flag: int = 0) -> bytes:
    return bytes((flag,)) + struct.pack(">I", len(text)) + text


@pytest.mark.asyncio
async def test_a_call_is_answered_with_headers_message_and_trailers() -> None:
    wire = Wire(METHODS)
    wire.send(headers("/echo"), data(message(b"hello")))
    assert await wire.answer() == (message(b"hello"), {
        ":status": "200", "content-type": "application/grpc", "grpc-status": "0",
        "grpc-accept-encoding": "identity, deflate, gzip"})  # fmt: skip


@pytest.mark.asyncio
async def test_a_call_may_come_byte_by_byte_and_in_many_frames() -> None:
    wire = Wire(METHODS)
    parts = [message(b"hello")[at : at + 2] for at in range(0, 10, 2)]
    frames = headers("/echo") + b"".join(data(part, flags=0) for part in parts) + data(b"")
    for byte in frames:
        wire.send(bytes((byte,)))
    assert (await wire.answer())[0] == message(b"hello")


@pytest.mark.asyncio
async def test_an_answer_waits_for_the_windows_of_stream_and_connection() -> None:
    wire = Wire(METHODS)
    wire.send(headers("/big"), data(message(b"200000")))
    first = await wire.frames()
    assert sum(len(payload) for kind, _, _, payload in first if kind == FrameType.DATA) == h2.DEFAULT_WINDOW_BYTES
    wire.send(h2.window_update(1, 1 << 20))
    assert [kind for kind, *_ in await wire.frames()] == []
    wire.send(h2.window_update(0, 1 << 20))
    rest = await wire.frames()
    assert sum(len(payload) for kind, _, _, payload in rest if kind == FrameType.DATA) == 200_005 - 65_535
    assert all(len(payload) <= h2.DEFAULT_MAX_FRAME_BYTES for _, _, _, payload in rest)
    assert rest[-1][0] == FrameType.HEADERS
    assert rest[-1][1] & h2.END_STREAM


@pytest.mark.parametrize(
    ("frames", "status", "text"),
    [
        (headers("/nope") + data(message(b"")), "12", ""),
        (headers("/echo", grpc_encoding="br") + data(message(b"", 1)), "12", "br"),
        (headers("/echo") + data(message(b"x", 1)), "13", "names no encoding"),
        (headers("/echo", grpc_encoding="gzip") + data(message(b"no gzip", 1)), "13", "decompressed"),
        (headers("/echo", grpc_encoding="gzip") + data(message(gzip.compress(b"cut off")[:-9], 1)), "13", "cut off"),
        (headers("/echo") + data(message(b"hello")[:7]), "13", "inside a message"),
        (headers("/echo") + data(b""), "13", "no message"),
        (headers("/echo") + data(b"\0\xff\xff\xff\xff"), "8", f"vs. {MAX_MESSAGE_BYTES}"),
        (headers("/echo", grpc_timeout="0n") + data(message(b"")), "4", "Deadline"),
    ],
)
@pytest.mark.asyncio
async def test_bad_calls_end_with_a_status(frames: bytes, status: str, text: str) -> None:
    wire = Wire(METHODS)
    wire.send(frames)
    _, fields = await wire.answer()
    assert fields["grpc-status"] == status
    assert text in fields.get("grpc-message", "")
    wire.send(headers("/echo", 3), data(message(b"next"), 3))
    assert (await wire.answer(3))[0] == message(b"next")


@pytest.mark.asyncio
async def test_compressed_messages_are_read() -> None:
    wire = Wire(METHODS)
    wire.send(headers("/echo", grpc_encoding="gzip"), data(message(gzip.compress(b"hello"), 1)))
    assert (await wire.answer())[0] == message(b"hello")


@pytest.mark.asyncio
async def test_settings_and_pings_are_acknowledged() -> None:
    wire = Wire({})
    await wire.frames()
    wire.send(h2.frame(FrameType.PING, 0, 0, b"12345678"), h2.settings({h2.Setting.MAX_FRAME_SIZE: 20_000}))
    assert await wire.frames() == [
        (FrameType.PING, h2.ACK, 0, b"12345678"),
        (FrameType.SETTINGS, h2.ACK, 0, b""),
    ]


@pytest.mark.asyncio
async def test_a_wider_window_is_acknowledged_before_it_is_used() -> None:
    """Until then the client counts by the narrow one, and ends a stream that passes it."""
    wire = Wire(METHODS)
    wire.send(h2.window_update(0, 1 << 20), headers("/big"), data(message(b"100000")))
    sent = sum(len(payload) for kind, _, _, payload in await wire.frames() if kind == FrameType.DATA)
    assert sent == h2.DEFAULT_WINDOW_BYTES
    wire.send(h2.settings({h2.Setting.INITIAL_WINDOW_SIZE: 1 << 20}))
    first, *rest = await wire.frames()
    assert first == (FrameType.SETTINGS, h2.ACK, 0, b"")
    assert sum(len(payload) for kind, _, _, payload in rest if kind == FrameType.DATA) == 100_005 - sent


def padded(size: int) -> bytes:
    return h2.frame(FrameType.DATA, h2.PADDED, 1, bytes((size,)) + b"abc")


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (h2.frame_header(FrameType.DATA, 0, 1, 2 << 20), Http2Code.FRAME_SIZE_ERROR),
        (data(b"x", 7), Http2Code.PROTOCOL_ERROR),
        (data(b"x", 0), Http2Code.PROTOCOL_ERROR),
        (headers("/echo", 2), Http2Code.PROTOCOL_ERROR),
        (headers("/echo") + padded(200), Http2Code.PROTOCOL_ERROR),
        (h2.frame(FrameType.PING, 0, 0, b"123"), Http2Code.FRAME_SIZE_ERROR),
        (h2.frame(FrameType.SETTINGS, 0, 0, b"12345"), Http2Code.FRAME_SIZE_ERROR),
        (h2.settings({h2.Setting.MAX_FRAME_SIZE: 5}), Http2Code.PROTOCOL_ERROR),
        (h2.settings({h2.Setting.INITIAL_WINDOW_SIZE: 2**31}), Http2Code.FLOW_CONTROL_ERROR),
        (h2.window_update(0, 2**31 - 1), Http2Code.FLOW_CONTROL_ERROR),
        (h2.frame(FrameType.CONTINUATION, h2.END_HEADERS, 1, b""), Http2Code.PROTOCOL_ERROR),
        (h2.frame(FrameType.HEADERS, 0, 1, b"") + h2.frame(FrameType.PING, 0, 0, bytes(8)), Http2Code.PROTOCOL_ERROR),
        (h2.frame(FrameType.HEADERS, h2.END_HEADERS, 1, b"\xff\xff\xff\xff\xff"), Http2Code.COMPRESSION_ERROR),
        (
            h2.frame(FrameType.HEADERS, 0, 1, b"")
            + b"".join(h2.frame(FrameType.CONTINUATION, 0, 1, bytes(60_000)) for _ in range(2)),
            Http2Code.ENHANCE_YOUR_CALM,
        ),
    ],
)
@pytest.mark.asyncio
async def test_who_breaks_the_protocol_is_told_and_cut_off(frames: bytes, code: Http2Code) -> None:
    wire = Wire(METHODS)
    wire.send(frames)
    assert await wire.goaway_code() is code


@pytest.mark.asyncio
async def test_who_asks_on_and_on_without_reading_is_cut_off() -> None:
    wire = Wire({})
    wire.connection.pause_writing()
    wire.send(h2.settings({}) * MAX_UNREAD_ACKS)
    assert not wire.is_closed
    wire.send(h2.settings({}))
    assert await wire.goaway_code() is Http2Code.ENHANCE_YOUR_CALM


@pytest.mark.asyncio
async def test_who_pings_too_often_is_told_and_cut_off() -> None:
    wire = Wire(METHODS)
    for _ in range(3):  # the first is early for nobody, two strikes are let pass
        wire.send(h2.frame(FrameType.PING, 0, 0, bytes(8)))
    assert not wire.is_closed
    wire.send(h2.frame(FrameType.PING, 0, 0, bytes(8)))
    assert await wire.goaway_code() is Http2Code.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(("accepted", "is_packed"), [("identity,gzip", True), ("identity", False)])
@pytest.mark.asyncio
async def test_answers_are_compressed_for_who_takes_them_so(accepted: str, is_packed: bool) -> None:
    methods = {"/infer": Method(Api.INFERENCE, big), "/big": Method(None, big)}
    wire = Wire(methods, ServerOptions(grpc_infer_response_compression_level=CompressionLevel.HIGH))
    wire.send(headers("/infer", grpc_accept_encoding=accepted), data(message(b"10000")))
    body, fields = await wire.answer()
    assert (fields.get("grpc-encoding") == "gzip", body[0] == 1) == (is_packed, is_packed)
    assert (gzip.decompress(body[5:]) if is_packed else body[5:]) == bytes(10_000)
    wire.send(headers("/big", 3, grpc_accept_encoding=accepted), data(message(b"10000"), 3))
    assert (await wire.answer(3))[0] == message(bytes(10_000))


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [("/echo", "right", "0"), ("/echo", "wrong", "16"), ("/echo", "", "16"), ("/grpc.health.v1.Health/Check", "", "0")],
)
@pytest.mark.asyncio
async def test_calls_need_an_api_key_where_there_are_some(path: str, key: str, status: str) -> None:
    wire = Wire({**METHODS, "/grpc.health.v1.Health/Check": Method(None, echo)}, ServerOptions(api_key=("right",)))
    wire.send(headers(path, authorization=f"Bearer {key}"), data(message(b"hello")))
    _, fields = await wire.answer()
    assert fields["grpc-status"] == status


def stream_of(function: Callable[..., Any]) -> dict[str, Method]:
    return {"/stream": Method(None, stream=function)}


@pytest.mark.asyncio
async def test_a_reset_cancels_the_call_and_a_late_message_is_dropped() -> None:
    ended = asyncio.Event()

    async def wait(read: Any, write: Any, call: GrpcCall) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    wire = Wire(stream_of(wait) | METHODS)
    wire.send(headers("/stream"))
    await wire.frames()
    wire.send(h2.rst_stream(1, Http2Code.CANCEL), data(message(b"late")))
    await asyncio.wait_for(ended.wait(), 1)
    wire.send(headers("/echo", 3), data(message(b"next"), 3))
    assert (await wire.answer(3))[0] == message(b"next")


@pytest.mark.asyncio
async def test_a_stream_reads_and_writes_as_it_likes() -> None:
    async def double(read: Any, write: Any, call: GrpcCall) -> None:
        while (text := await read()) is not None:
            await write(text)
            await write(text)

    wire = Wire(stream_of(double))
    wire.send(headers("/stream"), data(message(b"a"), flags=0))
    assert (await wire.answer())[0] == message(b"a") * 2
    wire.send(data(message(b"b") + message(b"c")))
    answered, fields = await wire.answer()
    assert answered == message(b"b") * 2 + message(b"c") * 2
    assert fields == {"grpc-status": "0"}


async def double(read: Any, write: Any, call: GrpcCall) -> None:
    while (text := await read()) is not None:
        await write(text * 2)


@pytest.mark.asyncio
async def test_a_connection_that_is_too_old_leaves_its_streams_to_their_clients() -> None:
    wire = Wire(stream_of(double))
    wire.send(headers("/stream"))
    wire.connection.retire()
    wire.send(data(message(b"a"), flags=0))
    assert (await wire.answer())[0] == message(b"a" * 2)
    wire.send(data(b""))
    assert (await wire.answer())[1] == {"grpc-status": "0"}
    assert wire.is_closed


@pytest.mark.asyncio
async def test_a_server_that_stops_ends_streams_on_connections_that_were_too_old_already() -> None:
    wire = Wire(stream_of(double))
    wire.send(headers("/stream"))
    wire.connection.retire()
    wire.connection.stop()
    assert (await wire.answer())[1]["grpc-status"] == "14"
    assert wire.is_closed
