"""Trace and log settings over HTTP. What a setting may be is decided in `observe`."""

from __future__ import annotations

from typing import Any

from enginehouse.core import Core
from enginehouse.frontends.http_message import HttpRequest, Reply
from enginehouse.frontends.http_routes import PathParts
from enginehouse.frontends.json_values import parse_json
from enginehouse.frontends.kserve_http.models import json_reply
from enginehouse.frontends.trace_settings import known_model


class SettingHandlers:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def trace(self, http: HttpRequest, parts: PathParts) -> Reply:
        model_name = known_model(self._core, parts.get("model", ""))
        if http.method == "POST":
            self._core.tracing.apply_json(model_name, _document(http))
        return json_reply(self._core.tracing.as_dict(model_name))

    async def logs(self, http: HttpRequest, parts: PathParts) -> Reply:
        if http.method == "POST":
            self._core.logs.apply_json(_document(http))
        return json_reply(self._core.logs.as_dict())


def _document(http: HttpRequest) -> dict[str, Any]:
    """What is no object sets nothing; Triton takes it for a question, too."""
    document = parse_json(http.body)
    return document if isinstance(document, dict) else {}
