"""POST …/infer: from a request's bytes to its answer's.

Errors before the body is read and errors of the model are text/plain, those of the body and of the core's
checks application/json; both carry JSON. Clients look at it, so it is kept.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator

from enginehouse.core import Core, ServedVersion
from enginehouse.errors import EnginehouseError, FailureReason, InvalidArgument, Unsupported
from enginehouse.frontends.compression import accepted_encoding, compress, decompress
from enginehouse.frontends.http_message import (
    EVENTS,
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
from enginehouse.frontends.inference import AnswerStream, infer_once
from enginehouse.frontends.kserve_http.infer_codec import (
    BodyDecoder,
    encode_response,
)
from enginehouse.frontends.output_options import OutputOptions
from enginehouse.frontends.request_parameters import HeaderForwarding
from enginehouse.frontends.request_traces import RequestTraces
from enginehouse.frontends.shared_memory.regions import Regions
from enginehouse.types import InferRequest, InferResponse

_HEADER_LENGTH = "inference-header-content-length"
JSON_ALLOWANCE = 4
"""How much longer than the largest tensor a body may be: numbers written out take more bytes."""
_LEADING_NUMBER = re.compile(r"\s*([+-]?\d+)")


class InferHandler:
    def __init__(
        self,
        core: Core,
        regions: Regions,
        forwarding: HeaderForwarding,
        traces: RequestTraces,
        max_input_bytes: int,
    ) -> None:
        self._core = core
        self._regions = regions
        self._forwarding = forwarding
        self._traces = traces
        self._max_input_bytes = max_input_bytes

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
        options = OutputOptions()
        request = InferRequest(served.name, parts["version"])
        request.times.received_ns = http.received_ns or time.monotonic_ns()
        if streamed:
            return await self._stream(http, request, options, served)
        try:
            return await self._answer(http, request, options, served)
        finally:
            options.release()

    async def _answer(
        self, http: HttpRequest, request: InferRequest, options: OutputOptions, served: ServedVersion
    ) -> Reply:
        try:
            body = self._body(http, served)
            header_length = _header_length(http.headers.get(_HEADER_LENGTH), len(body))
        except _BadBody as error:
            return error_response(error, TEXT)
        self._decode(http, request, options, served, body, header_length)
        try:
            response = await infer_once(self._core, request)
        except BaseException as error:
            self._traces.abandon(request)
            # What Triton leaves to its backends to find wrong, such as strings that are cut off.
            if isinstance(error, EnginehouseError) and error.reason is FailureReason.BACKEND:
                return error_response(error, TEXT)
            raise
        try:
            if response.error is not None:
                raise response.error
            reply = encode_response(response, options, served)
        except EnginehouseError as error:
            reply = error_response(error, TEXT)
        else:
            reply = _compressed(reply, http.headers.get("accept-encoding"))
        reply.on_sent = self._traces.sending(request)
        return reply

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
        body: Buffer,
        header_length: int,
    ) -> None:
        decoder = BodyDecoder(request, options, self._regions, self._max_input_bytes)
        if header_length:
            decoder.decode(body, header_length)
        else:
            decoder.decode_raw(body, served)
        self._forwarding.apply(request, http.headers.items())
        self._traces.begin(request, http.headers.items())

    async def _stream(
        self, http: HttpRequest, request: InferRequest, options: OutputOptions, served: ServedVersion
    ) -> Reply:
        """Our addition: every answer of any model as a server-sent event, JSON outputs only."""
        try:
            body = self._body(http, served)
            header_length = _header_length(http.headers.get(_HEADER_LENGTH), len(body))
            self._decode(http, request, options, served, body, header_length)
            answers = AnswerStream(request)
            self._core.submit(request)
        except BaseException:
            options.release()
            raise
        return HttpStream(200, EVENTS, _events(answers, options, served))


async def _events(answers: AnswerStream, options: OutputOptions, served: ServedVersion) -> AsyncIterator[Buffer]:
    try:
        async for response in answers:
            if response.error is not None:
                yield b"data: " + error_body(str(response.error)) + b"\n\n"
            elif response.has_response:
                yield b"data: " + _event(response, options, served) + b"\n\n"
    finally:
        options.release()


def _event(response: InferResponse, options: OutputOptions, served: ServedVersion) -> bytes:
    for option in (options.default, *options.by_name.values()):
        option.binary = False
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


def _compressed(reply: HttpResponse, accept: str | None) -> HttpResponse:
    encoding = accepted_encoding(accept)
    if encoding is not None:
        reply.body = (compress(reply.body, encoding),)
        reply.headers = (*reply.headers, ("Content-Encoding", encoding))
    return reply
