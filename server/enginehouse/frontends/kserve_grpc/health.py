"""grpc.health.v1: what load balancers and orchestrators ask."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2

from enginehouse.config.schema import SERVICE_NAME
from enginehouse.core import Core
from enginehouse.errors import NotFound
from enginehouse.frontends.grpc_call import GrpcCall, Method, Read, Write
from enginehouse.frontends.kserve_grpc.infer import parse
from enginehouse.frontends.restricted_apis import Api

HEALTH_SERVICE = "grpc.health.v1.Health"
_WATCH_INTERVAL_S = 1.0
"""Readiness is a state, not an event: a watcher hears of a change at most so late."""


class HealthMethods:
    """The service "" is the server, and so is the inference service by its name."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def methods(self) -> dict[str, Method]:
        return {
            f"/{HEALTH_SERVICE}/Check": Method(Api.HEALTH, self.check),
            f"/{HEALTH_SERVICE}/Watch": Method(Api.HEALTH, stream=self.watch),
        }

    async def check(self, data: bytes, call: GrpcCall) -> bytes:
        service = parse(health_pb2.HealthCheckRequest, data).service
        if service not in ("", SERVICE_NAME, HEALTH_SERVICE):
            raise NotFound(f"unknown service '{service}'")
        return self._status(service)

    async def watch(self, read: Read, write: Write, call: GrpcCall) -> None:
        service = parse(health_pb2.HealthCheckRequest, await read() or b"").service
        said = b""
        while True:
            is_last = self._core.stopping
            status = self._status(service)
            if status != said:
                said = status
                await write(status)
            if is_last:
                return
            await asyncio.sleep(_WATCH_INTERVAL_S)

    def _status(self, service: str) -> bytes:
        states = health_pb2.HealthCheckResponse.ServingStatus
        if service not in ("", SERVICE_NAME, HEALTH_SERVICE):
            status = states.SERVICE_UNKNOWN
        else:
            status = states.SERVING if self._core.is_ready() else states.NOT_SERVING
        data: bytes = health_pb2.HealthCheckResponse(status=status).SerializeToString()
        return data
