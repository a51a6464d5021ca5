"""Spoils HTTP/2 frames under the gRPC port: what is well framed is answered, what is not ends its connection alone."""

from __future__ import annotations

import asyncio
import struct
from random import Random

from tests.fuzz import grpc_seeds
from tests.fuzz.mutations import spoilt_bytes
from tests.fuzz.report import UNEXPECTED, Report

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_MOMENT_S = 0.05
_GOAWAY = 7


def _frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BHBBI", len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream_id) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


def _headers(path: str) -> bytes:
    pairs = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"fuzz"),
             (b"te", b"trailers"), (b"content-type", b"application/grpc"))  # fmt: skip
    return b"".join(_literal(name, value) for name, value in pairs)


def _frames(dice: Random) -> list[bytes]:
    frames = [_frame(4, 0, 0)]
    for number in range(dice.choice((1, 1, 2, 5))):
        seed = dice.choice(grpc_seeds.SEEDS[:20])
        stream_id = 2 * number + 1
        message = seed.make().SerializeToString()
        frames.append(_frame(1, 4, stream_id, _headers(seed.path)))
        frames.append(_frame(0, 1, stream_id, b"\x00" + struct.pack(">I", len(message)) + message))
    for _ in range(dice.choice((0, 1, 1, 3, 30))):
        kind, flags = dice.randrange(11), dice.choice((0, 1, 4, 5, 8, 0x20, 0xFF))
        payload = dice.randbytes(dice.choice((0, 4, 5, 6, 8, 12, 60)))
        stream_id = dice.choice((0, 1, 1, 3, 5, 9, 2, 2**31 - 1, 2**31))
        frames.insert(dice.randrange(len(frames) + 1), _frame(kind, flags, stream_id, payload))
    return frames


class Http2Attack:
    """`run` opens so many connections, so many at a time, and spoils each of them."""

    def __init__(self, host: str, port: int, seed: int, report: Report) -> None:
        self._host, self._port = host, port
        self._seed = seed
        self._report = report

    async def run(self, num_connections: int, num_at_once: int) -> None:
        share = -(-num_connections // num_at_once)
        await asyncio.gather(*(self._client(number, share) for number in range(num_at_once)))

    async def _client(self, number: int, num_connections: int) -> None:
        dice = Random(f"{self._seed} {number}")
        for _ in range(num_connections):
            data = b"".join(_frames(dice))
            if dice.random() < 0.5:
                data = spoilt_bytes(dice, data, dice.choice((1, 2, 5)))
            await self._connection(PREFACE + data if dice.random() < 0.95 else spoilt_bytes(dice, PREFACE) + data)

    async def _connection(self, data: bytes) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        heard = b""
        try:
            writer.write(data)
            async with asyncio.timeout(_MOMENT_S):
                while part := await reader.read(65536):
                    heard += part
            self._report.closed += 1
        except ConnectionError:
            self._report.closed += 1
        except TimeoutError:
            self._report.abandoned += 1  # it waits for more, as it should
        finally:
            writer.close()
        self._report.answers["http2 connections"] += 1
        _look(self._report, data, heard)


def _look(report: Report, data: bytes, heard: bytes) -> None:
    if UNEXPECTED.search(heard):
        report.find("an error that nobody thought of", data, heard)
