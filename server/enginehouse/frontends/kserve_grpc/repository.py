"""The repository extension over gRPC: index, load with overrides, unload."""

from __future__ import annotations

from enginehouse.config import schema
from enginehouse.core import Core
from enginehouse.errors import InvalidArgument
from enginehouse.frontends.grpc_call import GrpcCall
from enginehouse.frontends.kserve_grpc.infer import parse
from enginehouse.frontends.kserve_http.repository import FILE_PREFIX, refuse_repository_name


class RepositoryMethods:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def index(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.RepositoryIndexRequest, data)
        response = schema.RepositoryIndexResponse()
        for entry in self._core.index(request.repository_name, request.ready):
            response.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
        return response.SerializeToString()

    async def load(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.RepositoryModelLoadRequest, data)
        refuse_repository_name(request.repository_name)
        config: str | None = None
        files: dict[str, bytes] = {}
        for key, value in request.parameters.items():
            kind = value.WhichOneof("parameter_choice")
            if key == "config":
                _expect(key, kind, "string_param")
                config = value.string_param
            elif key.startswith(FILE_PREFIX):
                _expect(key, kind, "bytes_param")
                files[key.removeprefix(FILE_PREFIX)] = value.bytes_param
            else:
                raise InvalidArgument(f"unrecognized load parameter '{key}'.")
        await self._core.load(request.model_name, config, files)
        return schema.RepositoryModelLoadResponse().SerializeToString()

    async def unload(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.RepositoryModelUnloadRequest, data)
        refuse_repository_name(request.repository_name)
        unload_dependents = False
        if "unload_dependents" in request.parameters:
            value = request.parameters["unload_dependents"]
            if value.WhichOneof("parameter_choice") != "bool_param":
                raise InvalidArgument("invalid value type for 'unload_dependents' parameter, expected bool_param.")
            unload_dependents = value.bool_param
        await self._core.unload(request.model_name, unload_dependents)
        return schema.RepositoryModelUnloadResponse().SerializeToString()


def _expect(key: str, kind: str | None, wanted: str) -> None:
    if kind != wanted:
        raise InvalidArgument(f"invalid value type for load parameter '{key}', expected {wanted}.")
