"""Delays that suites written for Triton ask for by environment variables, to make races repeatable.

TRITONSERVER_DELAY_GRPC_* and TRITONSERVER_DELAY_RESPONSE_*, in milliseconds; read once, normally all 0.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from enginehouse.frontends.grpc_call import GrpcCall, Read, Stream, Unary, Write
from enginehouse.scheduling.test_hooks import delay_ms


@dataclass(frozen=True, slots=True)
class GrpcDelays:
    """Seconds before a call's method runs, before its answer is sent, and after."""

    before_s: float
    answering_s: float
    after_s: float

    @classmethod
    def from_environment(cls) -> GrpcDelays:
        def total_s(*stages: str) -> float:
            return sum(map(delay_ms, stages)) / 1000

        return cls(
            total_s("GRPC_PROCESS_ENTRY", "GRPC_PROCESS"),
            total_s("GRPC_RESPONSE", "GRPC_ENQUEUE", "RESPONSE_COMPLETION", "RESPONSE_COMPLETE_EXEC"),
            total_s("GRPC_COMPLETE", "GRPC_NOTIFICATION"),
        )

    def __bool__(self) -> bool:
        return bool(self.before_s or self.answering_s or self.after_s)

    def unary(self, function: Unary) -> Unary:
        """The same method, held back."""

        async def delayed(data: bytes, call: GrpcCall) -> bytes:
            await asyncio.sleep(self.before_s)
            answer = await function(data, call)
            await asyncio.sleep(self.answering_s + self.after_s)
            return answer

        return delayed

    def stream(self, function: Stream) -> Stream:
        async def delayed(read: Read, write: Write, call: GrpcCall) -> None:
            async def late_read() -> bytes | None:
                data = await read()
                await asyncio.sleep(self.before_s)
                return data

            async def late_write(data: bytes) -> None:
                await asyncio.sleep(self.answering_s)
                await write(data)

            await function(late_read, late_write, call)
            await asyncio.sleep(self.after_s)

        return delayed
