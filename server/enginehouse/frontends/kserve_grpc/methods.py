"""The table of gRPC methods: which path, which group of the API, which function."""

from __future__ import annotations

from enginehouse.config.schema import SERVICE_NAME
from enginehouse.core import Core
from enginehouse.frontends.grpc_call import Method
from enginehouse.frontends.kserve_grpc.infer import InferDecoder, InferMethod
from enginehouse.frontends.kserve_grpc.models import ModelMethods
from enginehouse.frontends.kserve_grpc.repository import RepositoryMethods
from enginehouse.frontends.kserve_grpc.settings import SettingMethods
from enginehouse.frontends.kserve_grpc.shared_memory import SharedMemoryMethods
from enginehouse.frontends.kserve_grpc.stream import StreamMethod
from enginehouse.frontends.request_parameters import HeaderForwarding
from enginehouse.frontends.restricted_apis import Api
from enginehouse.frontends.shared_memory.regions import Regions
from enginehouse.frontends.tenants import TenantHeader
from enginehouse.options import ServerOptions


def v2_methods(core: Core, options: ServerOptions, regions: Regions) -> dict[str, Method]:
    forwarding = HeaderForwarding(options.grpc_header_forward_pattern)
    decoder = InferDecoder(core, regions, forwarding, TenantHeader.of(options.tenant_header))
    models, repository = ModelMethods(core), RepositoryMethods(core)
    memory, settings = SharedMemoryMethods(regions), SettingMethods(core)
    methods = {
        "ServerLive": Method(Api.HEALTH, models.live),
        "ServerReady": Method(Api.HEALTH, models.ready),
        "ModelReady": Method(Api.HEALTH, models.model_ready),
        "ServerMetadata": Method(Api.METADATA, models.server_metadata),
        "ModelMetadata": Method(Api.METADATA, models.metadata),
        "ModelInfer": Method(Api.INFERENCE, InferMethod(core, decoder).infer),
        "ModelStreamInfer": Method(Api.INFERENCE, stream=StreamMethod(core, decoder).stream),
        "ModelConfig": Method(Api.MODEL_CONFIG, models.config),
        "ModelStatistics": Method(Api.STATISTICS, models.statistics),
        "RepositoryIndex": Method(Api.MODEL_REPOSITORY, repository.index),
        "RepositoryModelLoad": Method(Api.MODEL_REPOSITORY, repository.load),
        "RepositoryModelUnload": Method(Api.MODEL_REPOSITORY, repository.unload),
        "SystemSharedMemoryStatus": Method(Api.SHARED_MEMORY, memory.system_status),
        "SystemSharedMemoryRegister": Method(Api.SHARED_MEMORY, memory.system_register),
        "SystemSharedMemoryUnregister": Method(Api.SHARED_MEMORY, memory.system_unregister),
        "CudaSharedMemoryStatus": Method(Api.SHARED_MEMORY, memory.cuda_status),
        "CudaSharedMemoryRegister": Method(Api.SHARED_MEMORY, memory.cuda_register),
        "CudaSharedMemoryUnregister": Method(Api.SHARED_MEMORY, memory.cuda_unregister),
        "TraceSetting": Method(Api.TRACE, settings.trace),
        "LogSettings": Method(Api.LOGGING, settings.logs),
    }
    return {f"/{SERVICE_NAME}/{name}": method for name, method in methods.items()}
