"""POST …/infer: from a request's bytes to its answer's.

Errors before the body is read and errors of the model are text/plain, those of the body and of the core's
checks application/json; both carry JSON. Clients look at it, so it is kept.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from enginehouse.core import Core, ServedVersion
from enginehouse.errors import EnginehouseError, FailureReason, InvalidArgument, Unsupported
from enginehouse.frontends.compression import accepted_encoding, compress, decompress
from enginehouse.frontends.http_message import (
    EVENTS,
    JSON,
    TEXT,
    Buffer,
    HttpRequest,
    HttpResponse,
    HttpStream,
    Reply,
    error_body,
    error_response,
)
from enginehouse.frontends.http_routes import PathParts
from enginehouse.frontends.inference import AnswerStream, Exchange
from enginehouse.frontends.json_values import parse_json
from enginehouse.frontends.kserve_http.infer_codec import BodyDecoder, encode_response
from enginehouse.frontends.output_options import OutputOptions
from enginehouse.frontends.pending import Pending
from enginehouse.frontends.request_parameters import HeaderForwarding
from enginehouse.frontends.request_traces import RequestTraces
from enginehouse.frontends.shared_memory.regions import Regions
from enginehouse.frontends.tenants import TenantHeader
from enginehouse.frontends.wire_errors import as_wire_error
from enginehouse.types import InferRequest, InferResponse

_HEADER_LENGTH = "inference-header-content-length"
JSON_ALLOWANCE = 4
"""How much longer than the largest tensor a body may be: numbers written out take more bytes."""
_LONG_TEXT_BYTES = 1 << 20
_LEADING_NUMBER = re.compile(r"\s*([+-]?\d+)")


class InferHandler:
    def __init__(
        self,
        core: Core,
        regions: Regions,
        forwarding: HeaderForwarding,
        tenants: TenantHeader,
        traces: RequestTraces,
        max_input_bytes: int,
    ) -> None:
        self._core = core
        self._regions = regions
        self._forwarding = forwarding
        self._tenants = tenants
        self._traces = traces
        self._max_input_bytes = max_input_bytes

    def begin(self, http: HttpRequest, parts: PathParts) -> Pending[HttpResponse] | None:
        """The answer to be; None where something has to be waited for or refused before the body is read."""
        served = self._core.model_now(parts["model"], parts["version"])
        if served is None or served.decoupled or _wants_events(http) or _unsupported_encoding(http) is not None:
            return None
        if _is_long_text(http):
            return None
        return self._exchange(http, parts, served)

    async def handle(self, http: HttpRequest, parts: PathParts) -> Reply:
        try:
            served = await self._core.loaded_model(parts["model"], parts["version"])
            streamed = _wants_events(http)
            if served.decoupled and not streamed:
                raise Unsupported("HTTP end point doesn't support models with decoupled transaction policy")
            unsupported = _unsupported_encoding(http)
            if unsupported is not None:
                return unsupported
        except EnginehouseError as error:
            return error_response(error, TEXT)
        if streamed:
            return await self._stream(http, self._request(http, parts, served), OutputOptions(), served)
        ahead = None
        if _is_long_text(http):
            ahead = asyncio.ensure_future(asyncio.to_thread(self._read, http, served))
            await asyncio.wait([ahead])
        return await self._exchange(http, parts, served, ahead)

    def _read(self, http: HttpRequest, served: ServedVersion) -> _Read:
        """Long JSON is parsed here, which may be in a thread; short one where it is decoded."""
        body = self._body(http, served)
        header_length = _header_length(http.headers.get(_HEADER_LENGTH), len(body))
        is_long = header_length >= _LONG_TEXT_BYTES
        return _Read(body, header_length, parse_json(memoryview(body)[:header_length]) if is_long else None)

    def _request(self, http: HttpRequest, parts: PathParts, served: ServedVersion) -> InferRequest:
        request = InferRequest(served.name, parts["version"])
        request.tenant = self._tenants.tenant(http.headers.get)
        request.times.received_ns = http.received_ns or time.monotonic_ns()
        return request

    def _exchange(
        self, http: HttpRequest, parts: PathParts, served: ServedVersion, ahead: asyncio.Future[_Read] | None = None
    ) -> Pending[HttpResponse]:
        accept = http.headers.get("accept-encoding")
        exchange = _Exchange(self._request(http, parts, served), OutputOptions(), served, self._traces, accept)
        try:
            read = self._read(http, served) if ahead is None else ahead.result()
            self._decode(http, exchange.request, exchange.options, served, read)
            exchange.submit(self._core)
        except _BadBody as error:
            exchange.refuse(error_response(error, TEXT))
        except EnginehouseError as error:
            # What Triton leaves to its backends to find wrong, such as strings that are cut off.
            is_models = error.reason is FailureReason.BACKEND
            exchange.refuse(error_response(error, TEXT if is_models else JSON))
        except Exception as error:
            exchange.refuse(error_response(as_wire_error(error)))
        return exchange

    def _body(self, http: HttpRequest, served: ServedVersion) -> Buffer:
        encoding = http.headers.get("content-encoding")
        if not encoding or encoding == "identity":
            return http.body
        if not http.body:
            raise _BadBody("nothing to be decompressed")
        try:
            return decompress(http.body, encoding, JSON_ALLOWANCE * self._max_input_bytes)
        except InvalidArgument as error:
            raise InvalidArgument(f"{error} (request for model '{served.name}')") from None

    def _decode(
        self,
        http: HttpRequest,
        request: InferRequest,
        options: OutputOptions,
        served: ServedVersion,
        read: _Read,
    ) -> None:
        decoder = BodyDecoder(request, options, self._regions, self._max_input_bytes)
        if read.header_length:
            decoder.decode(read.body, read.header_length, read.document)
        else:
            decoder.decode_raw(read.body, served)
        if self._forwarding.is_on:
            self._forwarding.apply(request, http.headers.items())
        if self._traces.is_on:
            self._traces.begin(request, http.headers.items())

    async def _stream(
        self, http: HttpRequest, request: InferRequest, options: OutputOptions, served: ServedVersion
    ) -> Reply:
        """Our addition: every answer of any model as a server-sent event, JSON outputs only."""
        try:
            self._decode(http, request, options, served, self._read(http, served))
            answers = AnswerStream(request)
            self._core.submit_for_client(request)
        except BaseException:
            options.release()
            raise
        return HttpStream(200, EVENTS, _events(answers, options, served))


@dataclass(frozen=True, slots=True)
class _Read:
    """A body, unpacked. `document` is its JSON where that is long."""

    body: Buffer
    header_length: int
    document: Any


def _is_long_text(http: HttpRequest) -> bool:
    """Text that takes so long to parse that others would notice."""
    if len(http.body) < _LONG_TEXT_BYTES:
        return False
    return http.headers.get(_HEADER_LENGTH) is None or http.headers.get("content-encoding") is not None


class _Exchange(Exchange[HttpResponse]):
    __slots__ = ("_accept_encoding",)

    def __init__(
        self,
        request: InferRequest,
        options: OutputOptions,
        served: ServedVersion,
        traces: RequestTraces,
        accept_encoding: str | None,
    ) -> None:
        super().__init__(request, options, served, traces)
        self._accept_encoding = accept_encoding

    def encode(self, response: InferResponse) -> HttpResponse:
        reply = encode_response(response, self.options, self.served)
        if self._accept_encoding is not None:
            reply = _compressed(reply, self._accept_encoding)
        if self.request.trace is not None:
            reply.on_sent = self._traces.sending(self.request)
        return reply

    def failed(self, error: Exception) -> HttpResponse:
        reply = error_response(as_wire_error(error), TEXT)
        reply.on_sent = self._traces.sending(self.request)
        return reply


async def _events(answers: AnswerStream, options: OutputOptions, served: ServedVersion) -> AsyncIterator[Buffer]:
    options.default = replace(options.default, binary=False)
    options.by_name = {name: replace(option, binary=False) for name, option in options.by_name.items()}
    try:
        async for response in answers:
            if response.error is not None:
                yield b"data: " + error_body(str(response.error)) + b"\n\n"
            elif response.has_response:
                yield b"data: " + _event(response, options, served) + b"\n\n"
    finally:
        options.release()


def _event(response: InferResponse, options: OutputOptions, served: ServedVersion) -> bytes:
    try:
        return bytes(encode_response(response, options, served).body[0])
    except EnginehouseError as error:
        return error_body(str(error))


def _wants_events(http: HttpRequest) -> bool:
    return "text/event-stream" in (http.headers.get("accept") or "")


def _unsupported_encoding(http: HttpRequest) -> HttpResponse | None:
    if http.headers.get("content-encoding") in (None, "identity", "gzip", "deflate"):
        return None
    error = Unsupported("Unsupported compression type")
    return HttpResponse(501, TEXT, (error_body(str(error)),), (("Accept-Encoding", "gzip, deflate"),))


class _BadBody(InvalidArgument):
    """Found before the JSON is read; goes out as text/plain."""


def _header_length(header: str | None, body_length: int) -> int:
    """How much of the body is JSON. Text that is no number counts as 0, a raw request, as atoi has it."""
    if header is None:
        return body_length
    match = _LEADING_NUMBER.match(header)
    length = int(match[1]) if match else 0
    if not 0 <= length <= body_length:
        raise _BadBody(f"inference header size should be in range (0, {body_length}), got: {header.strip()}")
    return length


def _compressed(reply: HttpResponse, accept: str) -> HttpResponse:
    encoding = accepted_encoding(accept)
    if encoding is not None:
        reply.body = (compress(reply.body, encoding),)
        reply.headers = (*reply.headers, ("Content-Encoding", encoding))
    return reply
