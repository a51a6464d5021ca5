"""The shared memory extensions over gRPC: register, status, unregister."""

from __future__ import annotations

from enginehouse.config import schema
from enginehouse.frontends.grpc_call import GrpcCall
from enginehouse.frontends.kserve_grpc.infer import parse
from enginehouse.frontends.shared_memory import cuda, system
from enginehouse.frontends.shared_memory.regions import RegionKind, Regions


class SharedMemoryMethods:
    def __init__(self, regions: Regions) -> None:
        self._regions = regions

    async def system_status(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.SystemSharedMemoryStatusRequest, data)
        response = schema.SystemSharedMemoryStatusResponse()
        for region in self._regions.status(RegionKind.SYSTEM, request.name):
            entry = response.regions[region.name]
            entry.name, entry.key = region.name, region.key
            entry.offset, entry.byte_size = region.offset, region.num_bytes
        return response.SerializeToString()

    async def system_register(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.SystemSharedMemoryRegisterRequest, data)
        self._regions.register(
            lambda: system.open_region(request.name, request.key, request.offset, request.byte_size),
            request.name,
            RegionKind.SYSTEM,
        )
        return schema.SystemSharedMemoryRegisterResponse().SerializeToString()

    async def system_unregister(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.SystemSharedMemoryUnregisterRequest, data)
        self._regions.unregister(RegionKind.SYSTEM, request.name)
        return schema.SystemSharedMemoryUnregisterResponse().SerializeToString()

    async def cuda_status(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.CudaSharedMemoryStatusRequest, data)
        response = schema.CudaSharedMemoryStatusResponse()
        for region in self._regions.status(RegionKind.CUDA, request.name):
            entry = response.regions[region.name]
            entry.name, entry.device_id, entry.byte_size = region.name, region.device_id, region.num_bytes
        return response.SerializeToString()

    async def cuda_register(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.CudaSharedMemoryRegisterRequest, data)
        self._regions.refuse_if_disabled()
        self._regions.register(
            lambda: cuda.open_region(request.name, request.raw_handle, request.device_id, request.byte_size),
            request.name,
            RegionKind.CUDA,
        )
        return schema.CudaSharedMemoryRegisterResponse().SerializeToString()

    async def cuda_unregister(self, data: bytes, call: GrpcCall) -> bytes:
        request = parse(schema.CudaSharedMemoryUnregisterRequest, data)
        self._regions.unregister(RegionKind.CUDA, request.name)
        return schema.CudaSharedMemoryUnregisterResponse().SerializeToString()
