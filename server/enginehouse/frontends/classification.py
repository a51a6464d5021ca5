"""The classification extension: the k highest elements of each row as `value:index[:label]` strings.

Pure. Values are written as C writes them: six decimals for floating types.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from enginehouse.errors import InvalidArgument
from enginehouse.types import Array, DataType, Tensor

_LENGTH = struct.Struct("<I")
_CLASSIFIABLE = frozenset(
    (
        DataType.UINT8, DataType.UINT16, DataType.UINT32, DataType.UINT64,
        DataType.INT8, DataType.INT16, DataType.INT32, DataType.INT64,
        DataType.FP32, DataType.FP64,
    )
)  # fmt: skip


def classify(tensor: Tensor, num_classes: int, labels: Sequence[str], batched: bool) -> Tensor:
    """A BYTES tensor of shape [rows, k], or [k] for a model without a batch axis.

    Raises InvalidArgument for types that have no order.
    """
    datatype = tensor.datatype
    if datatype not in _CLASSIFIABLE:
        raise InvalidArgument(f"class result not available for output due to unsupported type '{datatype.wire_name}'")
    num_rows = tensor.shape[0] if batched and tensor.shape else 1
    values = np.frombuffer(tensor.host_data(), datatype.numpy)
    rows = values.reshape(num_rows, -1) if num_rows else values.reshape(0, 0)
    top_k = min(num_classes, rows.shape[1])
    parts: list[bytes] = []
    for row in rows:
        for text in _top(row, top_k, labels, datatype):
            parts.append(_LENGTH.pack(len(text)))
            parts.append(text)
    shape = (num_rows, top_k) if batched else (top_k,)
    return Tensor(tensor.name, DataType.BYTES, shape, memoryview(b"".join(parts)))


def _top(row: Array, top_k: int, labels: Sequence[str], datatype: DataType) -> list[bytes]:
    # Of equal values the lower index comes first.
    order = np.lexsort((np.arange(row.size), _descending(row)))[:top_k]
    floating = datatype in (DataType.FP32, DataType.FP64)
    texts: list[bytes] = []
    for index in order.tolist():
        value = row[index].item()
        text = f"{value:f}:{index}" if floating else f"{value}:{index}"
        if index < len(labels) and labels[index]:
            text += f":{labels[index]}"
        texts.append(text.encode())
    return texts


def _descending(row: Array) -> Array:
    """A key that sorts the highest value first, whatever the type (negating unsigned numbers wraps)."""
    if row.dtype.kind == "f":
        return np.where(np.isnan(row), np.inf, -row)
    return np.invert(row) if row.dtype.kind == "u" else np.invert(row.astype(np.int64))
