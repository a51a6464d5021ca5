"""Health, metadata, config and statistics over HTTP: read-only views of the core."""

from __future__ import annotations

from typing import Any

import orjson

from enginehouse.config.json_form import to_wire
from enginehouse.core import Core
from enginehouse.errors import EnginehouseError, InvalidArgument
from enginehouse.frontends.http_message import TEXT, HttpRequest, HttpResponse, Reply, error_response
from enginehouse.frontends.http_routes import PathParts
from enginehouse.frontends.message_json import message_to_json
from enginehouse.frontends.model_metadata import listed_versions, platform_of
from enginehouse.types import TensorSpec


def json_reply(document: Any) -> HttpResponse:
    return HttpResponse(200, body=(orjson.dumps(document),))


class ModelHandlers:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def live(self, http: HttpRequest, parts: PathParts) -> Reply:
        return HttpResponse(200 if self._core.is_live() else 400, TEXT)

    async def ready(self, http: HttpRequest, parts: PathParts) -> Reply:
        return HttpResponse(200 if self._core.is_ready() else 400, TEXT)

    async def model_ready(self, http: HttpRequest, parts: PathParts) -> Reply:
        try:
            if await self._core.model_answers_ready(parts["model"], parts["version"]):
                return HttpResponse(200, TEXT)
            raise InvalidArgument("Model version not ready")
        except EnginehouseError as error:
            return error_response(error, TEXT)

    async def server_metadata(self, http: HttpRequest, parts: PathParts) -> Reply:
        core = self._core
        return json_reply(
            {"name": core.server_name, "version": core.server_version, "extensions": list(core.extensions)}
        )

    async def metadata(self, http: HttpRequest, parts: PathParts) -> Reply:
        served = await self._core.loaded_model(parts["model"], parts["version"])
        return json_reply(
            {
                "name": served.name,
                "versions": list(listed_versions(served, parts["version"])),
                "platform": platform_of(served.config),
                "inputs": [_tensor_metadata(spec) for spec in served.inputs.values()],
                "outputs": [_tensor_metadata(spec) for spec in served.outputs.values()],
            }
        )

    async def config(self, http: HttpRequest, parts: PathParts) -> Reply:
        served = await self._core.loaded_model(parts["model"], parts["version"])
        return json_reply(to_wire(served.config))

    async def statistics(self, http: HttpRequest, parts: PathParts) -> Reply:
        entries = self._core.statistics(parts.get("model", ""), parts.get("version", ""))
        return json_reply({"model_stats": [_statistics(entry) for entry in entries]})


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype.wire_name, "shape": spec.dims}


def _statistics(message: Any) -> dict[str, Any]:
    entry = message_to_json(message)
    assert isinstance(entry, dict)
    return entry
