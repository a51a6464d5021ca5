"""DLPack both ways, in ctypes: so that any framework's tensors pass without copies, BF16 included.

The structures and the capsule's life are those of DLPack's C header (dlpack.h, version 0.x managed tensors).
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import numpy as np

from enginehouse.types import DataType, Tensor
from enginehouse_backends.python_model.errors import TritonModelException

CPU, CUDA, CUDA_PINNED, CUDA_MANAGED = 1, 2, 3, 13
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6

_TYPE_CODES = {
    DataType.BOOL: (_BOOL, 8), DataType.UINT8: (_UINT, 8), DataType.UINT16: (_UINT, 16),
    DataType.UINT32: (_UINT, 32), DataType.UINT64: (_UINT, 64), DataType.INT8: (_INT, 8),
    DataType.INT16: (_INT, 16), DataType.INT32: (_INT, 32), DataType.INT64: (_INT, 64),
    DataType.FP16: (_FLOAT, 16), DataType.FP32: (_FLOAT, 32), DataType.FP64: (_FLOAT, 64),
    DataType.BF16: (_BFLOAT, 16),
}  # fmt: skip
_DATATYPES = {code: datatype for datatype, code in _TYPE_CODES.items()}


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("dl_tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter))

_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_IsValid.restype = ctypes.c_int
_api.PyCapsule_IsValid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)
_NAME, _USED = b"dltensor", b"used_dltensor"

_exported: dict[int, tuple[Any, ...]] = {}
"""What exported structures point to, by their address, until their consumer deletes them."""


def _forget(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


# Over raw object pointers: a py_object would revive the capsule that is just being destroyed.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))


def _on_capsule_gone(capsule: Any) -> None:
    if _is_valid(capsule, _NAME):
        _exported.pop(_pointer_of(capsule, _NAME), None)


_forget_exported = _Deleter(_forget)
_capsule_destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_on_capsule_gone)


def export(tensor: Tensor) -> Any:
    """A capsule that shares the tensor's memory. Raises TritonModelException for strings."""
    if tensor.datatype is DataType.BYTES:
        raise TritonModelException("DLPack does not have support for string tensors.")
    memory = np.frombuffer(tensor.host_data(), np.uint8)
    managed = _Managed()
    rank = len(tensor.shape)
    shape = (ctypes.c_int64 * max(rank, 1))(*tensor.shape)
    code, bits = _TYPE_CODES[tensor.datatype]
    described = managed.dl_tensor
    described.data = memory.ctypes.data
    described.device = _Device(CPU, 0)
    described.ndim = rank
    described.dtype = _Type(code, bits, 1)
    described.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    described.strides = None
    described.byte_offset = 0
    managed.deleter = _forget_exported
    address = ctypes.addressof(managed)
    _exported[address] = (managed, shape, memory)
    return _api.PyCapsule_New(address, _NAME, ctypes.cast(_capsule_destructor, ctypes.c_void_p))


class DeviceTensor:
    """A tensor on a GPU: kept where it is until it must go to the server."""

    def __init__(self, owner: Any, described: _Tensor, datatype: DataType, shape: tuple[int, ...]) -> None:
        self.owner = owner
        self.datatype = datatype
        self.shape = shape
        self.device_type = described.device.device_type
        self.device_id = described.device.device_id

    def to_host(self) -> memoryview:
        """Through the framework that made it."""
        owner = self.owner
        if hasattr(owner, "detach"):  # torch
            tensor = owner.detach().contiguous().cpu()
            array = tensor.view(_torch_bytes(tensor)).numpy() if tensor.dim() else tensor.reshape(1).numpy()
        elif hasattr(owner, "get"):  # cupy
            array = owner.get()
        else:
            raise TritonModelException(
                f"can't copy a GPU tensor of type '{type(owner).__name__}' to the host: pass a torch or cupy tensor"
            )
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _torch_bytes(tensor: Any) -> Any:
    import torch

    return torch.uint8 if tensor.dtype is torch.bfloat16 else tensor.dtype


def take(name: str, source: Any) -> Tensor | DeviceTensor:
    """The tensor behind a capsule or an object with `__dlpack__`. Raises TritonModelException."""
    capsule = source.__dlpack__() if hasattr(source, "__dlpack__") else source
    if type(capsule).__name__ != "PyCapsule" or not _api.PyCapsule_IsValid(capsule, _NAME):
        raise TritonModelException(
            f"tensor '{name}' is no DLPack capsule that is still unused, found '{type(source).__name__}'"
        )
    pointer = _api.PyCapsule_GetPointer(capsule, _NAME)
    managed = ctypes.cast(pointer, ctypes.POINTER(_Managed))
    described = managed.contents.dl_tensor
    datatype = _datatype(name, described)
    shape = tuple(described.shape[axis] for axis in range(described.ndim))
    _check_contiguous(described, shape)
    if described.device.device_type in (CUDA, CUDA_MANAGED):
        return DeviceTensor(source, described, datatype, shape)
    if described.device.device_type not in (CPU, CUDA_PINNED):
        raise TritonModelException(f"DLDevice type {described.device.device_type} is not support by Python backend.")
    return Tensor(name, datatype, shape, _adopt(capsule, managed, described, datatype, shape))


def _adopt(capsule: Any, managed: Any, described: _Tensor, datatype: DataType, shape: tuple[int, ...]) -> memoryview:
    """The memory, which goes back to its maker with the last view."""
    nbytes = math.prod(shape) * datatype.item_size
    _api.PyCapsule_SetName(capsule, _USED)
    address = (described.data or 0) + described.byte_offset
    buffer = (ctypes.c_uint8 * nbytes).from_address(address) if nbytes else (ctypes.c_uint8 * 0)()
    weakref.finalize(buffer, _delete, managed)
    return memoryview(buffer).cast("B")


def _delete(managed: Any) -> None:
    if managed.contents.deleter:
        managed.contents.deleter(managed)


def _datatype(name: str, described: _Tensor) -> DataType:
    kind = (described.dtype.code, described.dtype.bits)
    if described.dtype.lanes != 1 or kind not in _DATATYPES:
        raise TritonModelException(
            f"tensor '{name}': DLPack type code {kind[0]} with {kind[1]} bits has no Triton data type."
        )
    return _DATATYPES[kind]


def _check_contiguous(described: _Tensor, shape: tuple[int, ...]) -> None:
    if not described.strides:
        return
    expected = 1
    for axis in reversed(range(len(shape))):
        if shape[axis] != 1 and described.strides[axis] != expected:
            raise TritonModelException(
                "DLPack tensor is not contiguous. Only contiguous DLPack tensors that are stored in C-Order are "
                "supported."
            )
        expected *= shape[axis]
