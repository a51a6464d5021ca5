"""Vertex AI's two routes: health, and predictions, which a header may send on to any v2 endpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping

from enginehouse.core import Core
from enginehouse.errors import EnginehouseError, InvalidArgument
from enginehouse.frontends.cloud.binary_type import BinaryType
from enginehouse.frontends.http_message import TEXT, HttpRequest, HttpResponse, Reply, error_response
from enginehouse.frontends.http_routes import Router

REDIRECT_HEADER = "x-vertex-ai-triton-redirect"
_BINARY = BinaryType("vertex-ai")
_BAD_REQUEST = HttpResponse(400, TEXT)
_FAILED = "failed to start Vertex AI service: Invalid argument - "


class VertexAI:
    """`v2` serves what predictions are sent on to; it has the v2 routes and /metrics."""

    def __init__(self, core: Core, v2: Router, default_model: str, environment: Mapping[str, str] = os.environ) -> None:
        """Raises InvalidArgument where Vertex AI's variables are missing."""
        self._core = core
        self._v2 = v2
        self._default_model = default_model
        self._predict_route = environment.get("AIP_PREDICT_ROUTE", "")
        self.health_route = environment.get("AIP_HEALTH_ROUTE", "")
        if not self._predict_route:  # with Triton's slip of the pen, which scripts look for
            raise InvalidArgument(
                f"{_FAILED}API_PREDICT_ROUTE is not defined for Vertex AI endpoint (the variable AIP_PREDICT_ROUTE)"
            )
        if not self.health_route:
            raise InvalidArgument(f"{_FAILED}AIP_HEALTH_ROUTE is not defined for Vertex AI endpoint")

    async def handle(self, http: HttpRequest) -> Reply:
        if http.path == self.health_route:
            return await self._v2.handle(_sent_on(http, "/v2/health/ready", http.method))
        if http.path != self._predict_route:
            return _BAD_REQUEST
        if http.method != "POST":
            return HttpResponse(405, TEXT)
        target = http.headers.get(REDIRECT_HEADER)
        try:
            path = f"/v2/models/{self._model()}/infer" if target is None else f"/{target.lstrip('/')}"
            request = _BINARY.request(http)
        except EnginehouseError as error:
            return error_response(error)
        found = self._v2.find(path)
        if found is None:
            return _BAD_REQUEST
        # Predictions are always POST; the endpoints want their own methods.
        methods = found[0].methods
        method = "GET" if "GET" in methods and (len(methods) == 1 or path.endswith("/status")) else "POST"
        return _BINARY.reply(await self._v2.handle(_sent_on(request, path, method)))

    def _model(self) -> str:
        return self._default_model or _only_model(self._core)


def vertex_ai_problem(core: Core, default_model: str) -> str:
    """Why Vertex AI can't be served once the models of the start are loaded; "" if it can."""
    try:
        if not default_model:
            _only_model(core)
        elif not core.is_model_ready(default_model):
            return f"{_FAILED}Expect the default model '{default_model}' is loaded"
    except InvalidArgument as problem:
        return f"{_FAILED}{problem}"
    return ""


def _only_model(core: Core) -> str:
    names = {served.name for served in core.registry.all_ready()}
    if len(names) != 1:
        raise InvalidArgument(
            "Expect the model repository contains only a single model if default model is not specified"
        )
    return names.pop()


def _sent_on(http: HttpRequest, path: str, method: str) -> HttpRequest:
    return HttpRequest(method, path, "", http.headers, http.body, http.received_ns)
