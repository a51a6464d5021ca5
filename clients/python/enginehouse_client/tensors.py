"""Arrays as the v2 protocol's binary tensors, both ways. Pure."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_NAME_BY_DTYPE = {
    np.dtype(code): name
    for code, name in (
        ("?", "BOOL"), ("u1", "UINT8"), ("<u2", "UINT16"), ("<u4", "UINT32"), ("<u8", "UINT64"), ("i1", "INT8"),
        ("<i2", "INT16"), ("<i4", "INT32"), ("<i8", "INT64"), ("<f2", "FP16"), ("<f4", "FP32"), ("<f8", "FP64"),
    )
}  # fmt: skip
_DTYPE_BY_NAME = {name: dtype for dtype, name in _NAME_BY_DTYPE.items()}
_LENGTH = struct.Struct("<I")


def encode(name: str, value: object) -> tuple[dict[str, Any], bytes]:
    """The input's entry in the request's JSON, and its bytes. Text and bytes become BYTES.

    Raises TypeError for values of a type that the protocol lacks.
    """
    array = np.asarray(value)
    if array.dtype.kind in "OSU":
        data = b"".join(_element(item) for item in array.reshape(-1).tolist())
        datatype = "BYTES"
    else:
        found = _NAME_BY_DTYPE.get(array.dtype.newbyteorder("<"))
        if found is None:
            known = ", ".join(sorted(_DTYPE_BY_NAME))
            raise TypeError(f"input '{name}' has type {array.dtype}; the protocol has {known} and BYTES")
        datatype, data = found, np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    entry = {
        "name": name,
        "datatype": datatype,
        "shape": list(array.shape),
        "parameters": {"binary_data_size": len(data)},
    }
    return entry, data


def decode(entry: Mapping[str, Any], data: memoryview) -> Array:
    """An output. BF16, which numpy lacks, comes as float32; BYTES as an array of bytes objects."""
    shape, datatype = entry["shape"], entry["datatype"]
    if datatype == "BYTES":
        return _elements(data).reshape(shape)
    if datatype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, _DTYPE_BY_NAME[datatype]).reshape(shape)


def _element(item: object) -> bytes:
    raw = item if isinstance(item, bytes) else str(item).encode()
    return _LENGTH.pack(len(raw)) + raw


def _elements(data: memoryview) -> Array:
    found: list[bytes] = []
    offset = 0
    while offset < len(data):
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += 4
        found.append(bytes(data[offset : offset + length]))
        offset += length
    array = np.empty(len(found), dtype=object)
    array[:] = found
    return array
