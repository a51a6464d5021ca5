"""Who may ask: clients with an API key, and pages of other origins. Stands before the routes; off by default.

Keys are asked for on every path but those of health, and on every port but that of the metrics. They are compared in
constant time and never logged.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import orjson

from enginehouse.frontends.http_message import JSON, HttpRequest, HttpResponse, Reply, error_body
from enginehouse.options import ServerOptions

Handle = Callable[[HttpRequest], Awaitable[Reply]]

_OPEN_PATHS = re.compile(r"/v2/health/(live|ready)|/health(/ready)?|/ping")
OPEN_METHODS = re.compile(r"/grpc\.health\.v1\.Health/.*|/inference\.GRPCInferenceService/Server(Live|Ready)")
"""Of gRPC."""
MISSING_KEY = "this server asks for an API key: send 'Authorization: Bearer <key>'"
_EXPOSED = "Inference-Header-Content-Length, Content-Encoding"


class Keys:
    """The API keys; false where there are none and everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def admit(self, authorization: str | None) -> bool:
        """Whether a header's value carries one of the keys."""
        scheme, _, given = (authorization or "").partition(" ")
        token = given.strip().encode("utf-8", "surrogateescape")
        # All are compared, so that the time doesn't tell which came close.
        matches = [hmac.compare_digest(token, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def guarded(handle: Handle, options: ServerOptions, health_path: str = "") -> Handle:
    """`handle` behind what the options ask for; itself where they ask for nothing. `health_path`: one more of those."""
    keys, origins = Keys(options.api_key), frozenset(options.cors_allowed_origin)
    if keys:
        handle = _with_keys(handle, keys, health_path)
    return _with_origins(handle, origins) if origins else handle


def _with_keys(handle: Handle, keys: Keys, health_path: str) -> Handle:
    async def refuse(http: HttpRequest) -> Reply:
        body = error_body(MISSING_KEY)
        if http.path.startswith("/v1/"):
            about = {"message": MISSING_KEY, "type": "authentication_error", "param": None, "code": "invalid_api_key"}
            body = orjson.dumps({"error": about})
        return HttpResponse(401, JSON, (body,), (("WWW-Authenticate", "Bearer"),))

    def ask(http: HttpRequest) -> Awaitable[Reply]:
        is_open = http.path == health_path or _OPEN_PATHS.fullmatch(http.path)
        if is_open or keys.admit(http.headers.get("authorization")):
            return handle(http)
        return refuse(http)

    return ask


def _with_origins(handle: Handle, origins: frozenset[str]) -> Handle:
    """Cross-origin requests (the fetch standard): what browsers ask before, and what they need to show answers."""

    async def answer(http: HttpRequest, origin: str) -> Reply:
        allowed = (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"))
        if http.method == "OPTIONS" and http.headers.get("access-control-request-method") is not None:
            asked = http.headers.get("access-control-request-headers") or ""
            methods = ("Access-Control-Allow-Methods", "GET, POST, DELETE")
            more = (methods, ("Access-Control-Allow-Headers", asked), ("Access-Control-Max-Age", "600"))
            return HttpResponse(200, "", headers=(*allowed, *more))
        reply = await handle(http)
        return replace(reply, headers=(*reply.headers, *allowed, ("Access-Control-Expose-Headers", _EXPOSED)))

    def ask(http: HttpRequest) -> Awaitable[Reply]:
        origin = http.headers.get("origin")
        if origin is None or not ("*" in origins or origin in origins):
            return handle(http)
        return answer(http, origin)

    return ask
