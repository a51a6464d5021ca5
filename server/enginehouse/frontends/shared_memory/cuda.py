"""Device memory that clients share by CUDA IPC handles: opening, reading and writing it.

Goes to the driver by ctypes, only when a client registers a region; a machine without a GPU says so then.
The one place where the server process makes a CUDA context, because a handle opens only in a context.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from enginehouse.errors import Internal, InvalidArgument, Unsupported
from enginehouse.frontends.shared_memory.regions import Region, RegionKind
from enginehouse.types import DeviceData

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


class Driver:
    """The calls of libcuda that are needed, each raising Internal with the driver's own error name."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise Internal(f"{name} failed: {(text.value or b'unknown error').decode()}")

    def use(self, device_id: int) -> None:
        """Makes the device's primary context the thread's."""
        context = self._contexts.get(device_id)
        if context is None:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self.call("cuDeviceGet", ctypes.byref(device), device_id)
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[device_id] = context
        self.call("cuCtxSetCurrent", context)

    def open(self, handle: bytes, device_id: int) -> int:
        self.use(device_id)
        address = ctypes.c_uint64()
        raw = _IpcHandle.from_buffer_copy(handle)
        self.call("cuIpcOpenMemHandle_v2", ctypes.byref(address), raw, _LAZY_PEER_ACCESS)
        return address.value

    def allocation_bytes(self, address: int) -> int:
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        return size.value

    def read(self, device_id: int, address: int, num_bytes: int) -> bytearray:
        self.use(device_id)
        data = bytearray(num_bytes)
        target = (ctypes.c_char * num_bytes).from_buffer(data)
        self.call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))
        return data

    def write(self, device_id: int, address: int, data: memoryview) -> None:
        self.use(device_id)
        source = bytes(data)
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(len(source)))

    def close(self, device_id: int, address: int) -> None:
        self.use(device_id)
        self.call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


@cache
def driver() -> Driver:
    """Raises Unsupported without a CUDA driver."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        raise Unsupported("this machine has no CUDA driver (libcuda.so.1)") from None


@dataclass(slots=True)
class CudaData(DeviceData):
    """A range of an opened region, as a tensor's data."""

    device_id: int
    address: int
    nbytes: int

    @property
    def device(self) -> str:  # type: ignore[override]
        return f"cuda:{self.device_id}"

    def to_host(self) -> memoryview:
        return memoryview(driver().read(self.device_id, self.address, self.nbytes))


@dataclass(slots=True)
class CudaMemory:
    device_id: int
    address: int

    def view(self, offset: int, num_bytes: int) -> DeviceData:
        return CudaData(self.device_id, self.address + offset, num_bytes)

    def write(self, offset: int, data: memoryview) -> None:
        driver().write(self.device_id, self.address + offset, data)

    def close(self) -> None:
        driver().close(self.device_id, self.address)


def open_region(name: str, handle: bytes, device_id: int, num_bytes: int) -> Region:
    """Raises InvalidArgument without a GPU, and for a handle or size that is wrong."""
    if len(handle) != HANDLE_BYTES:
        raise InvalidArgument("failed to register shared memory region: invalid args")
    try:
        cuda = driver()
    except Unsupported as error:
        raise InvalidArgument(
            f"failed to register CUDA shared memory region: '{name}', GPUs not supported: {error}"
        ) from None
    try:
        address = cuda.open(handle, device_id)
    except Internal as error:
        raise InvalidArgument(f"failed to register shared memory region '{name}': {error}") from None
    if num_bytes == 0 or num_bytes > cuda.allocation_bytes(address):
        cuda.close(device_id, address)
        raise InvalidArgument(f"failed to register shared memory region '{name}': invalid args")
    return Region(name, RegionKind.CUDA, CudaMemory(device_id, address), num_bytes, device_id=device_id)
