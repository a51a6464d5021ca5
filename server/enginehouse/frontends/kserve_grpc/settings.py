"""Trace and log settings over gRPC. What a setting may be is decided in `observe`."""

from __future__ import annotations

from enginehouse.config import schema
from enginehouse.core import Core
from enginehouse.frontends.grpc_call import GrpcCall
from enginehouse.frontends.kserve_grpc.infer import parse
from enginehouse.frontends.trace_settings import known_model


class SettingMethods:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def trace(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.TraceSettingRequest, data)
        model_name = known_model(self._core, request.model_name)
        if request.settings:
            given = {key: list(setting.value) for key, setting in request.settings.items()}
            self._core.tracing.apply_grpc(model_name, given)
        response = schema.TraceSettingResponse()
        for key, value in self._core.tracing.as_dict(model_name).items():
            response.settings[key].value.extend([value] if isinstance(value, str) else value)
        return response.SerializeToString()

    async def logs(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.LogSettingsRequest, data)
        given = {}
        for key, setting in request.settings.items():
            kind = setting.WhichOneof("parameter_choice")
            given[key] = None if kind is None else getattr(setting, kind)
        self._core.logs.apply_grpc(given)
        response = schema.LogSettingsResponse()
        for key, value in self._core.logs.as_dict().items():
            entry = response.settings[key]
            if isinstance(value, bool):
                entry.bool_param = value
            elif isinstance(value, int):
                entry.uint32_param = value
            else:
                entry.string_param = value
        return response.SerializeToString()
