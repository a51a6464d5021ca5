"""Health, metadata, config and statistics over gRPC: read-only views of the core."""

from __future__ import annotations

from typing import Any

from enginehouse.config import schema
from enginehouse.core import Core
from enginehouse.frontends.grpc_call import GrpcCall
from enginehouse.frontends.kserve_grpc.infer import parse
from enginehouse.frontends.model_metadata import listed_versions, platform_of
from enginehouse.types import TensorSpec


class ModelMethods:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def live(self, data: bytes, call: GrpcCall) -> bytes:
        return schema.ServerLiveResponse(live=self._core.is_live()).SerializeToString()

    async def ready(self, data: bytes, call: GrpcCall) -> bytes:
        return schema.ServerReadyResponse(ready=self._core.is_ready()).SerializeToString()

    async def model_ready(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.ModelReadyRequest, data)
        ready = await self._core.model_answers_ready(request.name, request.version)
        return schema.ModelReadyResponse(ready=ready).SerializeToString()

    async def server_metadata(self, data: bytes, call: GrpcCall) -> bytes:
        core = self._core
        return schema.ServerMetadataResponse(
            name=core.server_name, version=core.server_version, extensions=core.extensions
        ).SerializeToString()

    async def metadata(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.ModelMetadataRequest, data)
        served = await self._core.loaded_model(request.name, request.version)
        return schema.ModelMetadataResponse(
            name=served.name,
            versions=listed_versions(served, request.version),
            platform=platform_of(served.config),
            inputs=[_tensor_metadata(spec) for spec in served.inputs.values()],
            outputs=[_tensor_metadata(spec) for spec in served.outputs.values()],
        ).SerializeToString()

    async def config(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.ModelConfigRequest, data)
        served = await self._core.loaded_model(request.name, request.version)
        return schema.ModelConfigResponse(config=served.config).SerializeToString()

    async def statistics(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.ModelStatisticsRequest, data)
        entries = self._core.statistics(request.name, request.version)
        return schema.ModelStatisticsResponse(model_stats=entries).SerializeToString()


def _tensor_metadata(spec: TensorSpec) -> Any:
    return schema.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype.wire_name, shape=spec.dims
    )
