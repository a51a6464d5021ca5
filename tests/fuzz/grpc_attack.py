"""Calls every gRPC method with spoilt messages, by grpcio's client, and looks at every status.

A call has to end before its deadline with a status that the front end chose: not UNKNOWN, not a lost connection.
"""

from __future__ import annotations

import asyncio
import re
import struct
from random import Random
from typing import Any

import grpc as grpcio

from enginehouse.config import schema
from tests.fuzz import grpc_seeds
from tests.fuzz.http_seeds import STEADY
from tests.fuzz.mutations import spoil_message, spoilt_bytes
from tests.fuzz.report import UNEXPECTED, Report

# The published types of grpcio demand serializers that the library makes optional.
grpc: Any = grpcio
METADATA = (
    ("x-test-header", "1"), ("triton-request-id", "\x7e"), ("a" * 200, "b" * 3000), ("x-bin", b"\x00\xff"),
    ("traceparent", "00-" + "1" * 32 + "-" + "2" * 16 + "-01"),
    ("triton_grpc_error", "true"),
)  # fmt: skip
_ANSWER_S = 20.0
_LOST = re.compile(r"[Ss]ocket|[Cc]onnection|GOAWAY|RST_STREAM|Stream removed|refused|Transport")

_WROTE_TOO_LATE = "Locally cancelled by application!"
"""What grpc.aio's client makes of a message that it still writes while the status of its stream comes in."""


class GrpcAttack:
    """`run` makes so many calls, so many at a time."""

    def __init__(self, address: str, seed: int, report: Report) -> None:
        self._address = address
        self._seed = seed
        self._report = report

    async def run(self, num_calls: int, num_at_once: int) -> None:
        share = -(-num_calls // num_at_once)
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(self._address, options) for _ in range(4)]
        try:
            await asyncio.gather(
                *(self._client(number, channels[number % 4], share) for number in range(num_at_once))
            )
        finally:
            for channel in channels:
                await channel.close()

    async def _client(self, number: int, channel: Any, num_calls: int) -> None:
        dice = Random(f"{self._seed} {number}")
        for _ in range(num_calls):
            if dice.random() < 0.01:
                await self._good(dice, channel)
            else:
                await self._spoilt(dice, channel)

    async def _good(self, dice: Random, channel: Any) -> None:
        """Has to be answered rightly, whatever goes on around it."""
        values = struct.pack("<4f", *(dice.random() for _ in range(4)))
        request = grpc_seeds.floats_of(values, STEADY).SerializeToString()
        try:
            raw = await channel.unary_unary(grpc_seeds.INFER)(request, timeout=_ANSWER_S)
        except grpc.RpcError as error:
            self._report.find(f"a good call failed: {error.code()}", request, error.details() or "")
            return
        answer = schema.ModelInferResponse.FromString(raw)
        self._report.answers["grpc OK"] += 1
        if list(answer.raw_output_contents) != [values]:
            self._report.find("a good call was answered wrongly", request, raw)

    async def _spoilt(self, dice: Random, channel: Any) -> None:
        [seed] = dice.choices(grpc_seeds.SEEDS, grpc_seeds.WEIGHTS)
        path = seed.path
        if dice.random() < 0.01:
            other = dice.choice(grpc_seeds.SEEDS).path
            path = dice.choice((path + "x", "/nope", "/inference.GRPCInferenceService/", other, other))
        messages = [_message(dice, seed) for _ in range(dice.choice((1, 1, 2, 5)) if path in grpc_seeds.STREAMS else 1)]
        is_hurried = dice.random() < 0.01
        settings: dict[str, Any] = {"timeout": dice.choice((0.0001, 0.002)) if is_hurried else _ANSWER_S}
        if dice.random() < 0.1:
            settings["metadata"] = dice.choices(METADATA, k=dice.choice((1, 2)))
        if dice.random() < 0.03:
            settings["compression"] = dice.choice((grpc.Compression.Gzip, grpc.Compression.Deflate))
        leaves = dice.random() < 0.01
        try:
            if path in grpc_seeds.STREAMS:
                call = channel.stream_stream(path)(iter(messages), **settings)
                if leaves:
                    call.cancel()
                async for answer in call:
                    self._look(messages, answer)
            else:
                call = channel.unary_unary(path)(messages[0], **settings)
                if leaves:
                    call.cancel()
                self._look(messages, await call)
            self._report.answers["grpc OK"] += 1
        except asyncio.CancelledError:  # what grpc.aio makes of the status CANCELLED, whoever said it
            details = await call.details() if call.done() else ""
            wrote_too_late = path in grpc_seeds.STREAMS and details == _WROTE_TOO_LATE
            if not leaves and not wrote_too_late:
                self._report.find("cancelled, though the client stayed", b" | ".join(messages), details)
            self._report.abandoned += 1
        except grpc.RpcError as error:
            self._judge(messages, error, is_hurried)

    def _look(self, messages: list[bytes], answer: bytes) -> None:
        if UNEXPECTED.search(answer):
            self._report.find("an error that nobody thought of", messages[0], answer)

    def _judge(self, messages: list[bytes], error: Any, is_hurried: bool) -> None:
        code, details = error.code(), error.details() or ""
        self._report.answers[f"grpc {code.name}"] += 1
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and not is_hurried:
            self._report.find(f"no answer in {_ANSWER_S} s", b" | ".join(messages), details)
        elif code is grpc.StatusCode.UNKNOWN:
            self._report.find("status UNKNOWN", b" | ".join(messages), details)
        elif code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL) and _LOST.search(details):
            self._report.find("the connection was lost", b" | ".join(messages), details)
        elif UNEXPECTED.search(details.encode()):
            self._report.find("an error that nobody thought of", b" | ".join(messages), details)


def _message(dice: Random, seed: grpc_seeds.Seed) -> bytes:
    message = seed.make()
    way = dice.random()
    if way < 0.7:
        spoil_message(dice, message, dice.choice((1, 1, 2, 4)))
    data: bytes = message.SerializeToString()
    if way > 0.6:
        data = spoilt_bytes(dice, data, dice.choice((1, 1, 3)))
    if way > 0.97:
        data += dice.choice(grpc_seeds.SEEDS).make().SerializeToString()
    return data
