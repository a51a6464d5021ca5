"""POST …/generate and …/generate_stream: flat JSON in; one JSON object or server-sent events out.

The status is that of the first answer, so nothing is sent before it. Errors here are always
application/json, and an error of the model is a 400, as clients of Triton find it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from enginehouse.core import Core
from enginehouse.errors import EnginehouseError, InvalidArgument
from enginehouse.frontends.http_message import (
    EVENTS,
    JSON,
    Buffer,
    HttpRequest,
    HttpResponse,
    HttpStream,
    Reply,
    error_body,
)
from enginehouse.frontends.http_routes import PathParts
from enginehouse.frontends.inference import AnswerStream
from enginehouse.frontends.json_values import parse_json_members
from enginehouse.frontends.kserve_http.generate_codec import decode_generate, encode_generate
from enginehouse.frontends.kserve_http.infer_codec import dump_json
from enginehouse.frontends.request_parameters import HeaderForwarding
from enginehouse.frontends.request_traces import RequestTraces
from enginehouse.frontends.tenants import TenantHeader
from enginehouse.types import InferRequest, InferResponse

_NOT_ONE = (
    "generate expects model to produce exactly 1 response, use generate stream for model that generates "
    "various number of responses"
)


class GenerateHandler:
    def __init__(self, core: Core, forwarding: HeaderForwarding, tenants: TenantHeader, traces: RequestTraces) -> None:
        self._core = core
        self._forwarding = forwarding
        self._tenants = tenants
        self._traces = traces

    async def generate(self, http: HttpRequest, parts: PathParts) -> Reply:
        request, answers = await self._submit(http, parts)
        responses = [response async for response in answers if _is_answer(response)]
        on_sent = self._traces.sending(request)
        if len(responses) != 1:
            return HttpResponse(200, JSON, (error_body(_NOT_ONE),), chunked=True, on_sent=on_sent)
        failed, body = _encode(responses[0])
        return HttpResponse(400 if failed else 200, JSON, (body,), chunked=True, on_sent=on_sent)

    async def generate_stream(self, http: HttpRequest, parts: PathParts) -> Reply:
        request, answers = await self._submit(http, parts)
        events = _events(answers)
        try:
            failed, first = await anext(events)
        except StopAsyncIteration:
            failed, first = False, b""
        except BaseException:
            answers.close()
            raise
        on_sent = self._traces.sending(request)
        return HttpStream(400 if failed else 200, EVENTS, _texts(first, events, answers), on_sent=on_sent)

    async def _submit(self, http: HttpRequest, parts: PathParts) -> tuple[InferRequest, AnswerStream]:
        if (http.headers.get("content-encoding") or "identity") != "identity":
            raise InvalidArgument("Unsupported content-encoding, only 'identity' is supported.")
        served = await self._core.loaded_model(parts["model"], parts["version"])
        request = InferRequest(served.name, parts["version"])
        request.tenant = self._tenants.tenant(http.headers.get)
        request.times.received_ns = http.received_ns or time.monotonic_ns()
        decode_generate(request, parse_json_members(http.body), served.inputs)
        self._forwarding.apply(request, http.headers.items())
        self._traces.begin(request, http.headers.items())
        answers = AnswerStream(request)
        self._core.submit_for_client(request)
        return request, answers


def _is_answer(response: InferResponse) -> bool:
    return response.has_response or response.error is not None


def _encode(response: InferResponse) -> tuple[bool, bytes]:
    """Whether it is an error, and its JSON."""
    try:
        if response.error is not None:
            raise response.error
        return False, dump_json(encode_generate(response))
    except EnginehouseError as error:
        return True, error_body(str(error))


async def _events(answers: AnswerStream) -> AsyncIterator[tuple[bool, bytes]]:
    async for response in answers:
        if _is_answer(response):
            yield _encode(response)


async def _texts(
    first: bytes, events: AsyncIterator[tuple[bool, bytes]], answers: AnswerStream
) -> AsyncIterator[Buffer]:
    try:
        if first:
            yield b"data: " + first + b"\n\n"
        async for _, body in events:
            yield b"data: " + body + b"\n\n"
    finally:
        answers.close()
