"""The request parser: the same requests however the bytes are cut, and nothing that can be read in two ways."""

from __future__ import annotations

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginehouse.frontends.http1 import BadRequest, Parser, Request

PIPELINED = (
    b"GET /a?x=1 HTTP/1.1\r\nHost: h\r\nX-One:  two \r\n\r\n"
    b"POST /b HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"
    b"POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;ext=1\r\nabc\r\n2\r\nde\r\n0\r\nTrailer: t\r\n\r\n"
    b"BREW http://host:80/d HTTP/1.0\r\n\r\n"
)


def feed(parser: Parser, data: bytes, cuts: list[int]) -> list[Request]:
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        found += parser.feed(data[start:end])
    return found


@given(st.lists(st.integers(0, len(PIPELINED)), max_size=6).map(sorted))
def test_requests_do_not_depend_on_how_the_bytes_are_cut(cuts: list[int]) -> None:
    requests = feed(Parser(), PIPELINED, cuts)
    assert [(r.method, r.path, r.query, bytes(r.body), r.keep_alive) for r in requests] == [
        ("GET", "/a", "x=1", b"", True),
        ("POST", "/b", "", b"hello", True),
        ("POST", "/c", "", b"abcde", True),
        ("BREW", "/d", "", b"", False),
    ]
    assert requests[0].headers.get("x-one") == "two"
    assert list(requests[0].headers.items()) == [("Host", "h"), ("X-One", "two")]


def test_one_byte_at_a_time_is_fine_too() -> None:
    assert len(feed(Parser(), PIPELINED, list(range(1, len(PIPELINED))))) == 4


@pytest.mark.parametrize(
    "data",
    [
        b"HELLO\r\n\r\n",
        b"HELLO\n",
        b"GET /a HTTP/2.0\r\n\r\n",
        b"GET  /a HTTP/1.1\r\n\r\n",
        b"GET /a HTTP/1.1\r\nBad Header: 1\r\n\r\n",
        b"GET /a HTTP/1.1\r\nX : 1\r\n\r\n",
        b"GET /a HTTP/1.1\r\nX: 1\r\n folded\r\n\r\n",
        b"GET /a HTTP/1.1\r\nX: a\nY: b\r\n\r\n",
        b"GET /a HTTP/1.1\r\nX: a\0b\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: abc\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
        b"GET /" + b"a" * 70000,
        b"GET /a HTTP/1.1\r\n" + b"X: 1\r\n" * 300 + b"\r\n",
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        Parser().feed(data)


def test_chunks_count_beside_a_length_and_the_connection_closes_after_them() -> None:
    lengths = b"Content-Length: 42\r\nTransfer-Encoding: chunked\r\n"
    [request] = Parser().feed(b"POST /a HTTP/1.1\r\n" + lengths + b"\r\n2\r\nab\r\n0\r\n\r\n")
    assert (bytes(request.body), request.keep_alive) == (b"ab", False)


def test_requests_before_a_bad_one_are_not_lost() -> None:
    with pytest.raises(BadRequest) as caught:
        Parser().feed(b"POST /a HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}trailing\r\n")
    [request] = caught.value.args[1]
    assert request.body == b"{}"


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_over_the_limit_is_thrown_away_and_counted(framing: str) -> None:
    parser = Parser(max_body_bytes=10)
    if framing == "length":
        data = b"POST /a HTTP/1.1\r\nContent-Length: 30\r\n\r\n" + b"x" * 30
    else:
        data = b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1e\r\n" + b"x" * 30 + b"\r\n0\r\n\r\n"
    [first, second] = parser.feed(data + b"GET /b HTTP/1.1\r\n\r\n")
    assert (first.too_large, first.body_bytes, bytes(first.body)) == (True, 30, b"")
    assert second.path == "/b"


def test_a_body_that_is_only_announced_takes_no_memory() -> None:
    before = psutil.Process().memory_info().rss
    parsers = [Parser() for _ in range(4)]
    for parser in parsers:
        parser.feed(b"POST /a HTTP/1.1\r\nContent-Length: %d\r\n\r\nab" % (256 << 20))
        assert parser.body_space() is not None
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_the_rest_of_a_long_body_may_be_written_in_place() -> None:
    parser = Parser()
    assert parser.feed(b"POST /a HTTP/1.1\r\nContent-Length: 6\r\n\r\nab") == []
    space = parser.body_space()
    assert space is not None
    space[:3] = b"cde"
    assert parser.body_received(3) is None
    space = parser.body_space()
    assert space is not None
    space[:1] = b"f"
    request = parser.body_received(1)
    assert request is not None
    assert bytes(request.body) == b"abcdef"
    assert not parser.in_request
