"""The shared memory extensions over HTTP: register, status, unregister."""

from __future__ import annotations

import base64
from typing import Any

from enginehouse.errors import InvalidArgument
from enginehouse.frontends.http_message import HttpRequest, HttpResponse, Reply, method_not_allowed
from enginehouse.frontends.http_routes import PathParts
from enginehouse.frontends.json_values import as_string, as_unsigned, member, parse_json
from enginehouse.frontends.kserve_http.models import json_reply
from enginehouse.frontends.shared_memory import cuda, system
from enginehouse.frontends.shared_memory.regions import Region, RegionKind, Regions


class SharedMemoryHandlers:
    def __init__(self, regions: Regions) -> None:
        self._regions = regions

    async def system(self, http: HttpRequest, parts: PathParts) -> Reply:
        return self._handle(http, parts, RegionKind.SYSTEM)

    async def cuda(self, http: HttpRequest, parts: PathParts) -> Reply:
        return self._handle(http, parts, RegionKind.CUDA)

    def _handle(self, http: HttpRequest, parts: PathParts, kind: RegionKind) -> Reply:
        action, name = parts["action"], parts["region"]
        if http.method != ("GET" if action == "status" else "POST"):
            return method_not_allowed()
        if action == "status":
            return json_reply([_status(region) for region in self._regions.status(kind, name)])
        if action == "unregister":
            self._regions.unregister(kind, name)
            return HttpResponse(200)
        self._regions.refuse_if_disabled()
        if not name:
            raise InvalidArgument(f"'region name' is necessary to register {kind} shared memory region")
        document = parse_json(http.body)
        if kind is RegionKind.SYSTEM:
            self._register_system(name, document)
        else:
            self._register_cuda(name, document)
        return HttpResponse(200)

    def _register_system(self, name: str, document: Any) -> None:
        key = as_string(_needed(document, "key"))
        offset = as_unsigned(document["offset"]) if "offset" in document else 0
        num_bytes = as_unsigned(_needed(document, "byte_size"))
        self._regions.register(lambda: system.open_region(name, key, offset, num_bytes), name, RegionKind.SYSTEM)

    def _register_cuda(self, name: str, document: Any) -> None:
        encoded = as_string(member(_needed(document, "raw_handle"), "b64"))
        num_bytes = as_unsigned(member(document, "byte_size"))
        device_id = as_unsigned(member(document, "device_id"))
        try:
            handle = base64.b64decode(encoded, validate=True)
        except ValueError:
            handle = b""
        if len(handle) != cuda.HANDLE_BYTES:
            raise InvalidArgument("'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t")
        self._regions.register(lambda: cuda.open_region(name, handle, device_id, num_bytes), name, RegionKind.CUDA)


def _needed(document: Any, field: str) -> Any:
    if isinstance(document, dict) and field in document:
        return document[field]
    raise InvalidArgument(f"Shared memory register request has no '{field}' field")


def _status(region: Region) -> dict[str, Any]:
    if region.kind is RegionKind.CUDA:
        return {"name": region.name, "device_id": region.device_id, "byte_size": region.num_bytes}
    return {
        "name": region.name, "key": region.key, "offset": region.offset, "byte_size": region.num_bytes,
    }  # fmt: skip
