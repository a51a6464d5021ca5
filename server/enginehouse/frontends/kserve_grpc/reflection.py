"""gRPC reflection over our own descriptor pool, so that grpcurl and the like need no proto files."""

from __future__ import annotations

from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from enginehouse.config.schema import GRPC_SERVICE_FILE, MODEL_CONFIG_FILE, SERVICE_NAME
from enginehouse.frontends.kserve_grpc.health import HEALTH_SERVICE

REFLECTION_SERVICE = "grpc.reflection.v1alpha.ServerReflection"
SERVICES = (SERVICE_NAME, HEALTH_SERVICE, REFLECTION_SERVICE)


def reflection_pool() -> DescriptorPool:
    """Ours and those of the two services that libraries bring."""
    pool = DescriptorPool()
    files = (MODEL_CONFIG_FILE, GRPC_SERVICE_FILE, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for file in files:
        pool.AddSerializedFile(file.serialized_pb)
    return pool
