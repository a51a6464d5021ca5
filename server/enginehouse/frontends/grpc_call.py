"""gRPC calls as methods see them: bytes and metadata, no object of any transport.

A method raises an EnginehouseError to end its call with that status. The transport (http2_transport.py)
cancels the task of a method whose client cancels, leaves, or runs out of time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from enginehouse.frontends.restricted_apis import Api


@dataclass(slots=True)
class GrpcCall:
    """`deadline_ns` is monotonic; 0 is none."""

    metadata: Sequence[tuple[str, str]] = ()
    deadline_ns: int = 0
    received_ns: int = 0

    def header(self, name: str) -> str | None:
        for key, value in self.metadata:
            if key == name:
                return value
        return None


Unary: TypeAlias = Callable[[bytes, GrpcCall], Awaitable[bytes]]
Read: TypeAlias = Callable[[], Awaitable[bytes | None]]
"""The next message, None when the client is done sending."""
Write: TypeAlias = Callable[[bytes], Awaitable[None]]
Stream: TypeAlias = Callable[[Read, Write, GrpcCall], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Method:
    """One of `unary` and `stream` is set."""

    api: Api | None
    unary: Unary | None = None
    stream: Stream | None = None
