"""API keys and browsers of other origins, before the routes of a little server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from enginehouse.frontends.access import guarded
from enginehouse.frontends.http_message import HttpRequest, Reply
from enginehouse.frontends.http_transport import HttpServer
from enginehouse.frontends.serving import make_regions, serve_sagemaker, serve_vertex_ai
from enginehouse.options import ServerOptions

from .little_server import Headers, LittleServer, echo, joined, little_server

MODEL = (
    'input { name: "IN" data_type: TYPE_FP32 dims: [-1] } output { name: "OUT" data_type: TYPE_FP32 dims: [-1] }'
)
BODY = b'{"inputs":[{"name":"IN","datatype":"FP32","shape":[1],"data":[1]}]}'
PAGE = "https://page.example"


@pytest.fixture
def server() -> LittleServer:
    return little_server({"m": (MODEL, echo)})


async def ask(server: LittleServer, options: ServerOptions, method: str, path: str, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await guarded(server.router.handle, options)(HttpRequest(method, path, "", Headers(named), BODY))


@pytest.mark.parametrize(
    ("authorization", "status"),
    [("Bearer one", 200), ("bearer two", 200), ("Bearer three", 401), ("Basic one", 401), ("one", 401), ("", 401)],
)
@pytest.mark.asyncio
async def test_only_who_has_a_key_may_ask(server: LittleServer, authorization: str, status: int) -> None:
    options = ServerOptions(api_key=("one", "two"))
    reply = await ask(server, options, "POST", "/v2/models/m/infer", Authorization=authorization)
    assert reply.status == status
    if status == 401:
        assert ("WWW-Authenticate", "Bearer") in reply.headers
        assert "send 'Authorization: Bearer <key>'" in json.loads(joined(reply))["error"]


@pytest.mark.asyncio
async def test_health_needs_no_key_and_openai_clients_get_their_errors_form(server: LittleServer) -> None:
    options = ServerOptions(api_key=("one",))
    assert (await ask(server, options, "GET", "/v2/health/live")).status == 200
    assert (await ask(server, options, "GET", "/v2/health/live/../../models/m")).status == 401
    refused: Any = await ask(server, options, "POST", "/v1/chat/completions")
    assert json.loads(joined(refused))["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("allowed", "is_let_in"), [((PAGE,), True), (("*",), True), (("https://other.example",), False)]
)
@pytest.mark.asyncio
async def test_pages_of_allowed_origins_may_ask(
    server: LittleServer, allowed: tuple[str, ...], is_let_in: bool
) -> None:
    options = ServerOptions(cors_allowed_origin=allowed, api_key=("one",))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    before = await ask(server, options, "OPTIONS", "/v2/models/m/infer", Origin=PAGE, **asked)
    assert before.status == (200 if is_let_in else 401)
    reply = await ask(server, options, "POST", "/v2/models/m/infer", Origin=PAGE, Authorization="Bearer one")
    assert reply.status == 200
    assert (("Access-Control-Allow-Origin", PAGE) in reply.headers) == is_let_in
    if is_let_in:
        assert ("Access-Control-Allow-Headers", "authorization") in before.headers


@pytest.mark.asyncio
async def test_the_clouds_ports_ask_for_a_key_as_well(server: LittleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/predict")
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/alive")
    options, regions = ServerOptions(api_key=("one",)), make_regions(ServerOptions())
    asked = {
        serve_sagemaker: (("GET", "/ping", 200), ("POST", "/invocations", 401), ("GET", "/models", 401)),
        serve_vertex_ai: (("GET", "/alive", 200), ("POST", "/predict", 401)),
    }
    for serve, expected in asked.items():
        front_end = serve(server.core, options, regions)
        assert isinstance(front_end, HttpServer)
        for method, path, status in expected:
            reply = await front_end.handle(HttpRequest(method, path, "", Headers({}), BODY))
            assert (path, reply.status) == (path, status)
