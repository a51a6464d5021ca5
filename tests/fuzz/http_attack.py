"""Sends spoilt HTTP requests over many connections and looks at every answer.

A request whose framing was left alone has to be answered. One whose raw bytes were spoilt may be answered, may end
the connection, or may be half a request: its client waits a moment and leaves.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from random import Random

from tests.fuzz import http_seeds
from tests.fuzz.mutations import spoilt_bytes, spoilt_json
from tests.fuzz.report import UNEXPECTED, Report

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "get", "FOO")
HEADERS = (
    "Content-Type", "Accept", "Accept-Encoding", "Inference-Header-Content-Length", "Content-Encoding", "Expect",
    "Authorization", "x-test-header", "Host", "triton-request-id", "traceparent", "Cookie", "Upgrade",
)  # fmt: skip
VALUES = (
    b"", b"0", b"-1", b"5", b"99999999999999999999", b"1e3", b"gzip", b"deflate", b"br", b"identity", b"*;q=0",
    b"a" * 5000, b"application/json", b"text/event-stream", b"100-continue", b"\xff\xfe",
    b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01",
)  # fmt: skip
_ANSWER_S = 20.0
_MOMENT_S = 0.05
_MAY_BE = frozenset((200, 400, 401, 403, 404, 405, 411, 413, 415, 417, 422, 429, 499, 500, 501, 503, 504))


@dataclass(frozen=True)
class Shot:
    """What is sent, and what of it is certain."""

    data: bytes
    is_framed: bool
    is_head: bool = False
    leaves: bool = False
    expected: bytes = b""
    """The end of the body of a good request's answer."""


def shoot(dice: Random) -> Shot:
    chance = dice.random()
    if chance < 0.01:
        return _good(dice)
    if chance < 0.0105:
        seed = dice.choice(http_seeds.LOAD)
    else:
        [seed] = dice.choices(http_seeds.SEEDS, http_seeds.WEIGHTS)
    method, path = seed.method, seed.path.encode()
    document, tail = seed.json(), seed.tail
    way = dice.random()
    if seed.document is not None and way < 0.55:
        document = spoilt_json(dice, seed.document, dice.choice((1, 1, 2, 3)))
    elif way < 0.65:
        document = spoilt_bytes(dice, document, dice.choice((1, 2, 5)))
    elif way < 0.7:
        tail = spoilt_bytes(dice, tail)
    elif way < 0.78:
        path = _legal(spoilt_bytes(dice, path, dice.choice((1, 2))), b"/")
    elif way < 0.83:
        method = dice.choice(METHODS)
    headers, body = seed.packed(document, tail)
    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    if way >= 0.9 or dice.random() < 0.05:
        fields = _spoilt_fields(dice, fields)
    data = _message(dice, method, path, fields, body)
    if dice.random() < 0.08:
        return Shot(spoilt_bytes(dice, data, dice.choice((1, 2, 4))), is_framed=False)
    return Shot(data, is_framed=True, is_head=method == "HEAD", leaves=dice.random() < 0.02)


def _good(dice: Random) -> Shot:
    """Has to be answered rightly, whatever goes on around it."""
    values = struct.pack("<4f", *(dice.random() for _ in range(4)))
    document = {
        "inputs": [{"name": "IN", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}],
        "outputs": [{"name": "OUT", "parameters": {"binary_data": True}}],
    }
    path = f"/v2/models/{http_seeds.STEADY}/infer"
    seed = http_seeds.Seed("POST", path, document, values)
    headers, body = seed.packed(seed.json(), values)
    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Shot(_message(dice, "POST", path.encode(), fields, body), is_framed=True, expected=values)


def _legal(text: bytes, otherwise: bytes) -> bytes:
    """Without what would end a request line or a header."""
    return bytes(byte for byte in text if byte > 0x20 and byte != 0x7F) or otherwise


def _spoilt_fields(dice: Random, fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    fields = list(fields)
    for _ in range(dice.choice((1, 1, 2, 30))):
        if fields and dice.random() < 0.3:
            name, value = fields.pop(dice.randrange(len(fields)))
            spoilt = spoilt_bytes(dice, value)
            fields.append((name, bytes(byte for byte in spoilt if byte >= 0x20 and byte != 0x7F)))
        else:
            fields.append((dice.choice(HEADERS).encode(), dice.choice(VALUES)))
    return fields


def _message(dice: Random, method: str, path: bytes, fields: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    lines = [b"%b %b HTTP/1.%d" % (method.encode(), path, dice.random() < 0.97)]
    lines += [b"%b: %b" % pair for pair in fields]
    if lines[0].endswith(b"1") and dice.random() < 0.1:
        lines.append(b"Transfer-Encoding: chunked")
        body = _chunked(dice, body)
    elif body or method != "GET":
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])


def _chunked(dice: Random, body: bytes) -> bytes:
    parts, at = [], 0
    while at < len(body):
        size = dice.choice((1, 3, 10, 1000))
        part = body[at : at + size]
        parts.append(b"%x\r\n%b\r\n" % (len(part), part))
        at += size
    return b"".join((*parts, b"0\r\n\r\n"))


class HttpAttack:
    """`run` sends so many shots over so many connections."""

    def __init__(self, host: str, port: int, seed: int, report: Report) -> None:
        self._host, self._port = host, port
        self._seed = seed
        self._report = report

    async def run(self, num_shots: int, num_connections: int) -> None:
        share = -(-num_shots // num_connections)
        await asyncio.gather(*(self._client(number, share) for number in range(num_connections)))

    async def _client(self, number: int, num_shots: int) -> None:
        dice = Random(f"{self._seed} {number}")
        shots = (shoot(dice) for _ in range(num_shots))
        while batch := list(islice(shots, 1)):
            await self._connection(batch[0], shots)

    async def _connection(self, first: Shot, shots: Iterable[Shot]) -> None:
        """One connection, for as long as the server and the shots keep it open."""
        shot: Shot | None = first
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            while shot is not None:
                writer.write(shot.data)
                if not await self._hear(shot, reader):
                    return
                shot = next(iter(shots), None)
        finally:
            writer.close()

    async def _hear(self, shot: Shot, reader: asyncio.StreamReader) -> bool:
        """Whether the connection goes on."""
        if shot.leaves:
            self._report.abandoned += 1
            return False
        try:
            async with asyncio.timeout(_ANSWER_S if shot.is_framed else _MOMENT_S):
                status, head, body = await _read_answer(reader, shot.is_head)
        except TimeoutError:
            if shot.is_framed:
                self._report.find(f"no answer in {_ANSWER_S} s", shot.data)
            self._report.abandoned += 1
            return False
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if shot.is_framed:
                self._report.find(f"closed without a whole answer: {error!r}", shot.data)
            self._report.closed += 1
            return False
        except ValueError as error:
            self._report.find(f"the answer is no HTTP: {error!r}", shot.data)
            return False
        self._report.answers[f"http {status}"] += 1
        self._judge(shot, status, head, body)
        return shot.is_framed and b"\r\nconnection: close" not in head

    def _judge(self, shot: Shot, status: int, head: bytes, body: bytes) -> None:
        if UNEXPECTED.search(body):
            self._report.find("an error that nobody thought of", shot.data, body)
        if status not in _MAY_BE:
            self._report.find(f"status {status}", shot.data, body)
        if shot.expected and not (status == 200 and body.endswith(shot.expected)):
            self._report.find("a good request was answered wrongly", shot.data, body)
        encoded = b"content-encoding" in head or b"inference-header-content-length" in head
        if b"application/json" in head and body and not encoded:
            try:
                json.loads(body)
            except ValueError as error:
                self._report.find(f"the answer is no JSON: {error}", shot.data, body)


async def _read_answer(reader: asyncio.StreamReader, is_head: bool) -> tuple[int, bytes, bytes]:
    status = 100
    while status == 100:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 "):
            raise ValueError(head[:60])
        status = int(head[9:12])
    if is_head:
        return status, head, b""
    if b"\r\ntransfer-encoding: chunked" in head:
        return status, head, await _read_chunks(reader)
    at = head.find(b"\r\ncontent-length: ")
    if at < 0:
        return status, head, await reader.read(-1)
    return status, head, await reader.readexactly(int(head[at + 18 : head.index(b"\r\n", at + 2)]))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while True:
        size = int(await reader.readuntil(b"\r\n"), 16)
        parts.append((await reader.readexactly(size + 2))[:-2])
        if size == 0:
            return b"".join(parts)
