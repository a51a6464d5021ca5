"""pb_utils.Tensor: a named array, in numpy or over DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np

from enginehouse.types import VALID_TYPES, Array, DataType
from enginehouse.types import Tensor as WireTensor
from enginehouse_backends.python_model.errors import TritonModelException

_NUMPY_BY_NUMBER: dict[int, type[np.generic]] = {
    1: np.bool_, 2: np.uint8, 3: np.uint16, 4: np.uint32, 5: np.uint64, 6: np.int8, 7: np.int16, 8: np.int32,
    9: np.int64, 10: np.float16, 11: np.float32, 12: np.float64, 13: np.object_,
}  # fmt: skip
_NUMBER_BY_NUMPY = {np.dtype(kind): number for number, kind in _NUMPY_BY_NUMBER.items()}
_DATATYPE_BY_NUMPY = {
    kind: datatype
    for datatype in VALID_TYPES
    if datatype not in (DataType.BF16, DataType.BYTES)
    for kind in (np.dtype(datatype.numpy),)
}


class Tensor:
    """A tensor of a request or of an answer. Inputs are views of memory that is the model's until it
    answers; writing into them is fine."""

    __slots__ = ("_array", "_device_tensor", "_name", "_wire")

    def __init__(self, name: str, numpy_array: Array) -> None:
        if not isinstance(numpy_array, np.ndarray):
            raise TritonModelException(f"Tensor '{name}' needs a numpy array, found '{type(numpy_array).__name__}'.")
        kind = numpy_array.dtype.kind
        if kind not in "OS" and numpy_array.dtype not in _DATATYPE_BY_NUMPY:
            raise TritonModelException("NumPy dtype is not supported.")
        self._name = name
        self._array: Array | None = numpy_array
        self._wire: WireTensor | None = None
        self._device_tensor: Any = None

    @classmethod
    def of_wire(cls, wire: WireTensor) -> Tensor:
        """Views it."""
        tensor = cls.__new__(cls)
        tensor._name = wire.name
        tensor._array = None
        tensor._wire = wire
        tensor._device_tensor = None
        return tensor

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        """Raises TritonModelException for a tensor on a GPU, or of a type that numpy lacks."""
        if self._array is not None:
            return self._array
        if self._wire is None:
            raise TritonModelException("Tensor is stored in GPU and cannot be converted to NumPy.")
        if self._wire.datatype is DataType.BF16:
            raise TritonModelException("The datatype BF16 is not supported by NumPy. Use 'to_dlpack()' instead.")
        self._array = self._wire.numpy()
        return self._array

    def triton_dtype(self) -> int:
        """The number of the model config's DataType."""
        if self._wire is not None:
            return self._wire.datatype.proto
        if self._array is not None:
            return _NUMBER_BY_NUMPY.get(self._array.dtype, 13)
        return int(self._device_tensor.datatype.proto)

    def shape(self) -> list[int]:
        if self._array is not None:
            return list(self._array.shape)
        return list(self._wire.shape if self._wire is not None else self._device_tensor.shape)

    def is_cpu(self) -> bool:
        return self._device_tensor is None

    def to_dlpack(self) -> Any:
        """A capsule over this memory. Raises TritonModelException for strings."""
        return self.__dlpack__()

    def __dlpack__(self, stream: Any = None, **_: Any) -> Any:
        from enginehouse_backends.python_model import dlpack

        if self._device_tensor is not None:
            return self._device_tensor.owner.__dlpack__(stream=stream)
        return dlpack.export(self.to_wire())

    def __dlpack_device__(self) -> tuple[int, int]:
        if self._device_tensor is not None:
            return (int(self._device_tensor.device_type), int(self._device_tensor.device_id))
        return (1, 0)

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> Tensor:
        """From a capsule or anything with `__dlpack__`; the memory is shared, not copied."""
        from enginehouse_backends.python_model import dlpack

        imported = dlpack.take(name, tensor)
        made = Tensor.__new__(Tensor)
        made._name = name
        made._array = None
        made._wire = imported if isinstance(imported, WireTensor) else None
        made._device_tensor = None if isinstance(imported, WireTensor) else imported
        return made

    def to_wire(self) -> WireTensor:
        """As the server sees it."""
        if self._array is not None:
            array = self._array
            if array.dtype.kind in "OS":
                return WireTensor.from_numpy(self._name, array, DataType.BYTES)
            if not array.flags.c_contiguous:
                array = np.ascontiguousarray(array)
            # A memoryview's cast is quicker than numpy's view, and can't do an empty or a 0-dimensional array.
            data = array.data.cast("B") if array.ndim and array.size else array.reshape(-1).view(np.uint8).data
            return WireTensor(self._name, _DATATYPE_BY_NUMPY[array.dtype], array.shape, data)
        if self._wire is not None:
            return self._wire
        return WireTensor(
            self._name,
            self._device_tensor.datatype,
            self._device_tensor.shape,
            self._device_tensor.to_host(),
        )


def triton_to_numpy_type(data_type: int) -> type[np.generic] | None:
    return _NUMPY_BY_NUMBER.get(data_type)


def numpy_to_triton_type(data_type: Any) -> int | None:
    kind = np.dtype(data_type)
    return 13 if kind.kind == "S" else _NUMBER_BY_NUMPY.get(kind)
