"""Content types that carry the length of a body's JSON, as the clouds' gateways pass no headers of ours.

`application/vnd.<vendor>-triton.binary+json;json-header-size=NUMBER`, in requests and answers.
"""

from __future__ import annotations

from collections.abc import Iterable

from enginehouse.errors import InvalidArgument
from enginehouse.frontends.http_message import Headers, HttpRequest, HttpResponse, Reply
from enginehouse.frontends.kserve_http.infer_codec import HEADER_LENGTH

_LOWERED = HEADER_LENGTH.lower()


class BinaryType:
    def __init__(self, vendor: str) -> None:
        self._prefix = f"application/vnd.{vendor}-triton.binary+json;json-header-size="

    def request(self, http: HttpRequest) -> HttpRequest:
        """With the length as the header that the v2 handlers read. Raises InvalidArgument."""
        given = http.headers.get("content-type") or ""
        position = given.find(self._prefix)
        if position > 0:
            raise InvalidArgument(f"expect MIME type for binary data starts with '{self._prefix}', got: {given}")
        length = given.removeprefix(self._prefix) if position == 0 else None
        headers = _WithLength(http.headers, length)
        return HttpRequest(http.method, http.path, http.query, headers, http.body, http.received_ns)

    def reply(self, reply: Reply) -> Reply:
        """With the length in the content type instead of the header."""
        if isinstance(reply, HttpResponse):
            kept = []
            for name, value in reply.headers:
                if name == HEADER_LENGTH:
                    reply.content_type = self._prefix + value
                else:
                    kept.append((name, value))
            reply.headers = kept
        return reply


class _WithLength:
    """Headers with another Inference-Header-Content-Length than the client sent, or none."""

    def __init__(self, headers: Headers, length: str | None) -> None:
        self._headers = headers
        self._length = length

    def get(self, name: str) -> str | None:
        return self._length if name == _LOWERED else self._headers.get(name)

    def items(self) -> Iterable[tuple[str, str]]:
        return self._headers.items()
