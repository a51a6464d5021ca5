"""Requests and answers as HTTP handlers see them: bytes and metadata, no object of any transport.

A handler takes a request and returns a Reply; the transport (http_transport.py) moves the bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import orjson

from enginehouse.errors import EnginehouseError
from enginehouse.frontends.wire_errors import http_status

Buffer: TypeAlias = bytes | bytearray | memoryview

JSON = "application/json"
TEXT = "text/plain"
OCTETS = "application/octet-stream"
EVENTS = "text/event-stream; charset=utf-8"


class Headers(Protocol):
    """`get` finds names that are given in lower case; `items` has them as the client wrote them."""

    @property
    def get(self) -> Callable[[str], str | None]: ...
    def items(self) -> Iterable[tuple[str, str]]: ...


@dataclass(slots=True)
class HttpRequest:
    """`path` is as sent, without the query and not percent-decoded."""

    method: str
    path: str
    query: str
    headers: Headers
    body: Buffer = b""
    received_ns: int = 0


@dataclass(slots=True)
class HttpResponse:
    """A whole answer. `body` is written piece by piece, so tensors need no copy."""

    status: int
    content_type: str = JSON
    body: Sequence[Buffer] = ()
    headers: Sequence[tuple[str, str]] = ()
    chunked: bool = False
    on_sent: Callable[[], None] | None = None
    """Called when the answer was handed to the socket, or can't be any more."""


@dataclass(slots=True)
class HttpStream:
    """An answer whose length nobody knows yet. The transport closes `chunks` when the client leaves."""

    status: int
    content_type: str
    chunks: AsyncIterator[Buffer]
    headers: Sequence[tuple[str, str]] = ()
    on_sent: Callable[[], None] | None = None


class Channel(Protocol):
    """Where an answer that is pushed goes. Nothing here waits."""

    @property
    def num_waiting_bytes(self) -> int:
        """What the client has not taken yet."""
        ...

    def send(self, data: bytes) -> None: ...
    def close(self) -> None:
        """The answer is complete."""
        ...


@dataclass(slots=True)
class HttpPush:
    """An answer whose parts come from callbacks: no task is woken for each of them.

    `begin` is called when the head is written, `on_gone` if the client leaves before the channel is closed.
    """

    status: int
    content_type: str
    begin: Callable[[Channel], None]
    on_gone: Callable[[], None]
    headers: Sequence[tuple[str, str]] = ()
    on_sent: Callable[[], None] | None = None


Reply: TypeAlias = HttpResponse | HttpStream | HttpPush
HttpHandler: TypeAlias = Callable[[HttpRequest], Awaitable[Reply]]


def error_body(message: str) -> bytes:
    return orjson.dumps({"error": _valid_text(message)})


def _valid_text(text: str) -> str:
    """Names in messages may come from undecodable bytes; JSON can't carry lone surrogates."""
    return text.encode("utf-8", "replace").decode()


def error_response(error: EnginehouseError, content_type: str = JSON) -> HttpResponse:
    return HttpResponse(http_status(error), content_type, (error_body(str(error)),))


NOT_FOUND = HttpResponse(404, TEXT, (error_body("Not Found"),))


def method_not_allowed(content_type: str = JSON) -> HttpResponse:
    return HttpResponse(405, content_type, (error_body("Method Not Allowed"),))
