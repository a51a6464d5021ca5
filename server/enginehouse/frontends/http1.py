"""HTTP/1.1 requests out of bytes, without I/O: RFC 9112 as strict as servers of today read it.

What could be read in two ways (odd line ends, folded lines, spaces before a colon, several lengths) is refused,
so that no proxy before us sees other requests than we do; chunks beside a length count, and the connection closes
after them (section 6.3). Bodies grow in one buffer that the transport may write into itself (`body_space`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from enginehouse.frontends.http_message import HttpRequest

MAX_HEAD_BYTES = 65536
MAX_HEADERS = 256
MAX_CHUNKS = 65536
_MAX_CHUNK_LINE = 4096
_CLEARED_BYTES = 65536
_BAD_LENGTH = -1

_REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([!-~\x80-\xff]+) HTTP/1\.([01])")
_HEADER_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\r\n\0]*?)[ \t]*")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")
_ABSOLUTE = re.compile(r"https?://[^/?#]*", re.IGNORECASE)


class BadRequest(Exception):
    """Bytes that are no request: nothing sensible can be answered, the connection has to close."""


class HeaderMap:
    """The fields of one request. `get` wants the name in lower case."""

    __slots__ = ("_fields", "get")

    def __init__(self, fields: list[tuple[str, str, str]]) -> None:
        """`fields`: lower-case name, name as written, value. The first of equal names counts."""
        self._fields = fields
        self.get: Callable[[str], str | None] = {name: value for name, _, value in reversed(fields)}.get

    def items(self) -> Iterable[tuple[str, str]]:
        return [(written, value) for _, written, value in self._fields]

    def values(self, name: str) -> list[str]:
        """Of a field that may stand there several times."""
        return [value for lowered, _, value in self._fields if lowered == name]


@dataclass(slots=True)
class Request(HttpRequest):
    """One request. `too_large`, `too_many_chunks` and `bad_length` say why it has no body."""

    minor_version: int = 1
    keep_alive: bool = True
    body_bytes: int = 0
    too_large: bool = False
    too_many_chunks: bool = False
    bad_length: bool = False

    @property
    def is_refused(self) -> bool:
        return self.too_large or self.too_many_chunks or self.bad_length


# Clients send the same lines again and again; parsed ones are remembered.
_known_lines: dict[str, tuple[str, str, str]] = {}
_MAX_KNOWN_LINES = 4096
_MAX_KNOWN_LENGTH = 128


def _parse_line(line: str) -> tuple[str, str, str]:
    match = _HEADER_LINE.fullmatch(line)
    if match is None:
        raise BadRequest(f"bad header line {line[:80]!r}")
    field = (match[1].lower(), match[1], match[2])
    if len(line) <= _MAX_KNOWN_LENGTH:
        if len(_known_lines) >= _MAX_KNOWN_LINES:
            _known_lines.clear()
        _known_lines[line] = field
    return field


@dataclass(frozen=True, slots=True)
class Head:
    """What a request's lines say, the body apart. `body_bytes` None: the body comes in chunks."""

    method: str
    path: str
    query: str
    headers: HeaderMap
    minor_version: int
    keep_alive: bool
    body_bytes: int | None
    expects_continue: bool


# A client's heads are often all the same, as are the lengths of its bodies.
_known_heads: dict[bytes, Head] = {}
_MAX_KNOWN_HEADS = 1024
_MAX_KNOWN_HEAD_BYTES = 1024


def parse_head(head: bytes) -> Head:
    """`head` is everything before the empty line. Raises BadRequest."""
    known = _known_heads.get(head)
    if known is not None:
        return known
    found = _parse_head(head)
    if len(head) <= _MAX_KNOWN_HEAD_BYTES:
        if len(_known_heads) >= _MAX_KNOWN_HEADS:
            _known_heads.clear()
        _known_heads[head] = found
    return found


def _parse_head(head: bytes) -> Head:
    first, _, rest = head.partition(b"\r\n")
    match = _REQUEST_LINE.fullmatch(first)
    if match is None:
        raise BadRequest(f"bad request line {first[:80]!r}")
    fields = []
    if rest:
        lines = rest.decode("latin-1").split("\r\n")
        if len(lines) > MAX_HEADERS:
            raise BadRequest("too many headers")
        known = _known_lines.get
        fields = [known(line) or _parse_line(line) for line in lines]
    headers = HeaderMap(fields)
    target = _text(match[2])
    if not target.startswith("/"):
        target = _ABSOLUTE.sub("", target, count=1) or "/"
    path, _, query = target.partition("?")
    minor = match[3][0] - 48
    return Head(
        match[1].decode("ascii"),
        path,
        query,
        headers,
        minor,
        _keeps_alive(headers, minor),
        _body_length(headers, minor),
        (headers.get("expect") or "").lower() == "100-continue",
    )


def _text(target: bytes) -> str:
    """Clients should have escaped what is not ASCII; many names in UTF-8 come without."""
    try:
        return target.decode()
    except UnicodeDecodeError:
        return target.decode("latin-1")


def _keeps_alive(headers: HeaderMap, minor_version: int) -> bool:
    if headers.get("transfer-encoding") is not None and headers.get("content-length") is not None:
        return False  # a proxy that went by the length means something else by the bytes after the chunks
    connection = headers.get("connection")
    if connection is None:
        return minor_version == 1
    tokens = [token.strip().lower() for token in connection.split(",")]
    if "close" in tokens:
        return False
    return minor_version == 1 or "keep-alive" in tokens


def _body_length(headers: HeaderMap, minor_version: int) -> int | None:
    """Bytes of the body; None if it comes in chunks, -1 if no number is said. Raises BadRequest for contradictions."""
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if coding is not None:
        several = len(headers.values("transfer-encoding")) > 1
        if minor_version == 0 or several or coding.lower() != "chunked":
            raise BadRequest("transfer-encoding other than chunked")
        return None
    if length is None:
        return 0
    if len(set(headers.values("content-length"))) > 1:
        raise BadRequest("several content-lengths")
    return int(length) if _LENGTH.fullmatch(length) else _BAD_LENGTH


class Parser:
    """Fed with bytes, gives requests whose bodies are complete.

    A body over `max_body_bytes` (0: no limit) is counted and thrown away, so that the client, which reads
    only after it has sent, gets its answer.
    """

    def __init__(self, max_body_bytes: int = 0) -> None:
        self._max_body_bytes = max_body_bytes
        self._pending = b""
        """Bytes of a head or chunk line that is not complete."""
        self._request: Request | None = None
        """The one whose body is being received."""
        self._chunks: _ChunkedBody | None = None
        self._body: bytearray | memoryview = bytearray()
        self._num_received = 0
        self.wants_continue = False
        """A client waits for `100 Continue` before it sends its body; whoever sends it resets this."""

    @property
    def in_request(self) -> bool:
        return self._request is not None or bool(self._pending)

    def body_space(self) -> memoryview | None:
        """Where the rest of the body belongs, if its length is known and it is wanted."""
        if self._request is None or self._chunks is not None or self._request.too_large:
            return None
        return memoryview(self._body)[self._num_received :]

    def body_received(self, num_bytes: int) -> Request | None:
        """After `num_bytes` were written into `body_space`: the request, if that was all."""
        self._num_received += num_bytes
        return self._finish() if self._num_received == len(self._body) else None

    def feed(self, data: bytes) -> list[Request]:
        """Raises BadRequest; requests that came before are then in its `args[1]`."""
        done: list[Request] = []
        try:
            while data:
                data = self._step(data, done)
        except BadRequest as error:
            raise BadRequest(str(error), done) from None
        return done

    def _step(self, data: bytes, done: list[Request]) -> bytes:
        """Takes something from the front of `data`; gives back the rest."""
        if self._request is None:
            return self._read_head(data, done)
        if self._chunks is not None:
            rest, ended = self._chunks.feed(data)
            if ended:
                self._take_chunks()
                done.append(self._finish())
            return rest
        wanted = self._request.body_bytes - self._num_received
        part = data[:wanted]
        if not self._request.too_large:
            self._body[self._num_received : self._num_received + len(part)] = part
        self._num_received += len(part)
        if self._num_received == self._request.body_bytes:
            done.append(self._finish())
        return data[wanted:]

    def _read_head(self, data: bytes, done: list[Request]) -> bytes:
        if self._pending:
            data = self._pending + data
            self._pending = b""
        else:
            data = data.lstrip(b"\r\n") if data[:1] in b"\r\n" else data
        end = data.find(b"\r\n\r\n")
        if end < 0 or end > MAX_HEAD_BYTES:
            if len(data) > MAX_HEAD_BYTES:
                raise BadRequest("head too long")
            _refuse_early(data)
            self._pending = data
            return b""
        head = parse_head(data[:end])
        length = head.body_bytes
        request = Request(
            head.method,
            head.path,
            head.query,
            head.headers,
            minor_version=head.minor_version,
            keep_alive=head.keep_alive,
        )
        if length == _BAD_LENGTH:
            request.bad_length = True
            done.append(request)
            raise BadRequest("bad content-length")  # where the next request begins nobody knows
        rest = data[end + 4 :]
        if length is not None and length <= len(rest) and not self._over_limit(length):
            request.body, request.body_bytes = rest[:length], length
            done.append(request)
            return rest[length:]
        self._begin_body(request, length)
        self.wants_continue = head.expects_continue and not rest
        return rest

    def _over_limit(self, num_bytes: int) -> bool:
        return bool(self._max_body_bytes) and num_bytes > self._max_body_bytes

    def _begin_body(self, request: Request, length: int | None) -> None:
        self._request = request
        self._num_received = 0
        if length is None:
            self._chunks = _ChunkedBody(self._max_body_bytes)
            return
        request.body_bytes = length
        request.too_large = self._over_limit(length)
        self._body = bytearray() if request.too_large else _room(length)

    def _take_chunks(self) -> None:
        assert self._request is not None
        assert self._chunks is not None
        request, chunks = self._request, self._chunks
        request.body_bytes = chunks.num_bytes
        request.too_large = self._over_limit(chunks.num_bytes)
        request.too_many_chunks = chunks.num_chunks > MAX_CHUNKS
        self._body = chunks.body

    def _finish(self) -> Request:
        request = self._request
        assert request is not None
        if not (request.too_large or request.too_many_chunks):
            request.body = self._body
        self._request, self._chunks, self._body = None, None, bytearray()
        self.wants_continue = False
        return request


def _room(num_bytes: int) -> bytearray | memoryview:
    """Long ones aren't cleared: what is announced may never come, and memory that is not written costs nothing."""
    return bytearray(num_bytes) if num_bytes <= _CLEARED_BYTES else np.empty(num_bytes, np.uint8).data


def _refuse_early(data: bytes) -> None:
    """Bytes whose first line can't be a request line need no more waiting."""
    line, ended, _ = data.partition(b"\n")
    if ended and _REQUEST_LINE.fullmatch(line.removesuffix(b"\r")) is None:
        raise BadRequest(f"bad request line {line[:80]!r}")


class _ChunkedBody:
    """Decodes chunks. Keeps at most `max_bytes` (0: all) and counts the rest."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._line = b""
        self._num_left = 0
        self._in_trailer = False
        self._ends_chunk = False
        self.num_bytes = 0
        self.num_chunks = 0
        self.body = bytearray()

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What is left of `data`, and whether the body is complete."""
        view = memoryview(data)
        position = 0
        while position < len(data):
            if self._num_left:
                part = view[position : position + self._num_left]
                self._keep(part)
                position += len(part)
                continue
            end = data.find(b"\n", position)
            if end < 0:
                self._line += data[position:]
                if len(self._line) > _MAX_CHUNK_LINE:
                    raise BadRequest("chunk line too long")
                return b"", False
            line = self._line + data[position:end]
            self._line = b""
            position = end + 1
            if not line.endswith(b"\r"):
                raise BadRequest("chunk line without CRLF")
            if self._read_line(line[:-1]):
                return data[position:], True
        return b"", False

    def _keep(self, part: memoryview) -> None:
        self.num_bytes += len(part)
        self._num_left -= len(part)
        self._ends_chunk = self._num_left == 0
        if (self._max_bytes and self.num_bytes > self._max_bytes) or self.num_chunks > MAX_CHUNKS:
            self.body = bytearray()
        else:
            self.body += part

    def _read_line(self, line: bytes) -> bool:
        """True at the end of the body."""
        if self._ends_chunk:
            if line:
                raise BadRequest("chunk longer than its size")
            self._ends_chunk = False
            return False
        if self._in_trailer:
            return not line
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise BadRequest(f"bad chunk size {line[:80]!r}")
        self._num_left = int(match[1], 16)
        if self._num_left:
            self.num_chunks += 1
        else:
            self._in_trailer = True
        return False
