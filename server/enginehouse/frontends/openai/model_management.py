"""`POST /v1/models/<name>/load` and `/unload`, as Triton's OpenAI front end has them: errors are `{"detail": …}`.

Of requests that would load or unload the same model at the same time one does, and the others are told.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import orjson

from enginehouse.core import Core
from enginehouse.errors import EnginehouseError
from enginehouse.frontends.http_message import NOT_FOUND, HttpRequest, HttpResponse, Reply
from enginehouse.frontends.http_routes import PathParts, RouteHandler
from enginehouse.frontends.wire_errors import http_status
from enginehouse.options import ModelControlMode


class ModelManagement:
    def __init__(self, core: Core, describe: Callable[[str], dict[str, Any]]) -> None:
        """`describe` gives what the API says of a model that is loaded."""
        self._core = core
        self._describe = describe
        self._changing: set[str] = set()
        """Models that a request is loading or unloading now."""

    def load(self) -> RouteHandler:
        return self._handler(self._load)

    def unload(self) -> RouteHandler:
        return self._handler(self._unload)

    def _handler(self, change: Callable[[str], Awaitable[HttpResponse]]) -> RouteHandler:
        async def handle(http: HttpRequest, parts: PathParts) -> Reply:
            name = unquote(parts["model"])
            if not parts["model"] or "/" in name:
                return NOT_FOUND
            if self._core.options.model_control_mode is not ModelControlMode.EXPLICIT:
                return detail(400, "Model load/unload requires --model-control-mode=explicit")
            if not name.strip() or name in (".", ".."):
                return detail(400, f"'{name}' can not be the name of a model")
            if name in self._changing:
                return detail(400, f"model '{name}' is already being loaded or unloaded")
            self._changing.add(name)
            try:
                return await change(name)
            except EnginehouseError as error:
                return detail(http_status(error), str(error))
            finally:
                self._changing.discard(name)

        return handle

    async def _load(self, name: str) -> HttpResponse:
        if self._is_loaded(name):
            return detail(400, f"model '{name}' is already loaded")
        await self._core.load(name)
        return HttpResponse(200, body=(orjson.dumps(self._describe(name)),))

    async def _unload(self, name: str) -> HttpResponse:
        if not self._is_loaded(name):
            return detail(400, f"unknown model '{name}'")
        await self._core.unload(name)
        return HttpResponse(200, body=(orjson.dumps({"status": "success", "model": name}),))

    def _is_loaded(self, name: str) -> bool:
        return any(entry.name == name for entry in self._core.index(ready_only=True))


def detail(status: int, text: str) -> HttpResponse:
    return HttpResponse(status, body=(orjson.dumps({"detail": text}),))
