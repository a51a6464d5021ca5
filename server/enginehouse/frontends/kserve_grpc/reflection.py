"""gRPC reflection over our own descriptor pool, so that grpcurl and the like need no proto files."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import ReflectionServicer

from enginehouse.config.schema import GRPC_SERVICE_FILE, MODEL_CONFIG_FILE, SERVICE_NAME
from enginehouse.frontends.grpc_call import GrpcCall, Method, Read, Write
from enginehouse.frontends.kserve_grpc.health import HEALTH_SERVICE
from enginehouse.frontends.kserve_grpc.infer import parse

REFLECTION_SERVICE = "grpc.reflection.v1alpha.ServerReflection"
REFLECTION_METHOD = f"/{REFLECTION_SERVICE}/ServerReflectionInfo"
SERVICES = (SERVICE_NAME, HEALTH_SERVICE, REFLECTION_SERVICE)


def reflection_pool() -> DescriptorPool:
    """Ours and those of the two services that libraries bring."""
    pool = DescriptorPool()
    files = (MODEL_CONFIG_FILE, GRPC_SERVICE_FILE, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for file in files:
        pool.AddSerializedFile(file.serialized_pb)
    return pool


class ReflectionMethods:
    """The service itself, for a transport that brings none; the answers are the library's."""

    def __init__(self, pool: DescriptorPool) -> None:
        # Any: grpcio's types take the library's generator for a function without a value
        self._servicer: Any = ReflectionServicer(SERVICES, pool)

    def methods(self) -> dict[str, Method]:
        return {REFLECTION_METHOD: Method(None, stream=self._reflect)}

    async def _reflect(self, read: Read, write: Write, call: GrpcCall) -> None:
        while (data := await read()) is not None:
            request = parse(reflection_pb2.ServerReflectionRequest, data)
            for answer in self._servicer.ServerReflectionInfo(iter((request,)), None):
                await write(answer.SerializeToString())
