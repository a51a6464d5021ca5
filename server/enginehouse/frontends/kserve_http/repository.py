"""The repository extension over HTTP: index, load with overrides, unload."""

from __future__ import annotations

import base64
from typing import Any

from enginehouse.core import Core, IndexEntry
from enginehouse.errors import Internal, InvalidArgument, Unsupported
from enginehouse.frontends.http_message import Buffer, HttpRequest, HttpResponse, Reply
from enginehouse.frontends.http_routes import PathParts
from enginehouse.frontends.json_values import as_bool, as_members, as_string, parse_json
from enginehouse.frontends.kserve_http.models import json_reply

FILE_PREFIX = "file:"


class RepositoryHandlers:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def index(self, http: HttpRequest, parts: PathParts) -> Reply:
        ready_only = False
        if len(http.body):
            document = parse_json(http.body)
            if isinstance(document, dict) and "ready" in document:
                ready_only = as_bool(document["ready"])
        entries = self._core.index(parts["repository"], ready_only)
        return json_reply([_index_entry(entry) for entry in entries])

    async def load(self, http: HttpRequest, parts: PathParts) -> Reply:
        refuse_repository_name(parts["repository"])
        config: str | None = None
        files: dict[str, bytes] = {}
        for key, value in _parameters(http.body).items():
            text = as_string(value)
            if key == "config":
                config = text
            elif key.startswith(FILE_PREFIX):
                files[key.removeprefix(FILE_PREFIX)] = _decode_file(key, text)
            else:
                raise Internal("unexpected error on creating Triton parameter")
        await self._core.load(parts["model"], config, files)
        return HttpResponse(200)

    async def unload(self, http: HttpRequest, parts: PathParts) -> Reply:
        refuse_repository_name(parts["repository"])
        await self._core.unload(parts["model"], _unload_dependents(http.body))
        return HttpResponse(200)


def refuse_repository_name(name: str) -> None:
    if name:
        raise Unsupported("'repository_name' specification is not supported")


def _parameters(body: Buffer) -> dict[str, Any]:
    document = parse_json(body) if len(body) else {}
    if isinstance(document, dict) and "parameters" in document:
        return as_members(document["parameters"])
    return {}


def _unload_dependents(body: Buffer) -> bool:
    """Anything but true, even a body that is no JSON, means no: so it is in Triton."""
    try:
        return _parameters(body).get("unload_dependents") is True
    except Internal:
        return False


def _decode_file(key: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InvalidArgument(f"load parameter '{key}' is not valid base64: {error}") from None


def _index_entry(entry: IndexEntry) -> dict[str, str]:
    optional = {"version": entry.version, "state": entry.state, "reason": entry.reason}
    return {"name": entry.name} | {key: value for key, value in optional.items() if value}
