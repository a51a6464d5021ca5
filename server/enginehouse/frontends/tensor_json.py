"""A tensor's elements as JSON values, both ways. No JSON text here: lists in, lists out.

Nesting is ignored as in Triton: `[[1, 2], [3]]` is three elements. FP16 and BF16 have no JSON form.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from enginehouse.errors import EnginehouseError, Internal, InvalidArgument
from enginehouse.frontends.json_values import (
    MAX_INT64,
    MAX_NESTING,
    MAX_UINT64,
    MIN_INT64,
    JsonTypeError,
    as_array,
    as_bool,
    as_signed,
    as_string,
    as_unsigned,
    nesting_error,
)
from enginehouse.types import DataType, Tensor

UNSIGNED = frozenset((DataType.UINT8, DataType.UINT16, DataType.UINT32, DataType.UINT64))
SIGNED = frozenset((DataType.INT8, DataType.INT16, DataType.INT32, DataType.INT64))
FLOATING = frozenset((DataType.FP32, DataType.FP64))
_LENGTH = struct.Struct("<I")
Values: TypeAlias = list[Any] | NDArray[Any]


def bytes_from_json(data: Any, datatype: DataType, shape: Sequence[int]) -> bytes:
    """The elements in wire layout.

    Raises JsonTypeError where an element has another type than the tensor, InvalidArgument for nesting over
    the limit, Internal where the number of elements is not the shape's (BYTES are counted by the core).
    """
    elements = flatten(as_array(data))
    if datatype is DataType.BYTES:
        return _encode_strings(elements)
    num_expected = math.prod(shape)
    fast = _fast_array(elements, datatype) if len(elements) == num_expected else None
    if fast is None:
        raise _first_error(elements, datatype, num_expected)
    return fast


def flatten(data: list[Any]) -> list[Any]:
    """The leaves in order. Lists of plain values, the usual case, come back as they are."""
    if list not in set(map(type, data)):
        return data
    leaves: list[Any] = []
    # An explicit stack: the depth is the client's choice.
    stack = [iter(data)]
    while stack:
        for element in stack[-1]:
            if isinstance(element, list):
                if len(stack) >= MAX_NESTING:
                    raise nesting_error()
                stack.append(iter(element))
                break
            leaves.append(element)
        else:
            stack.pop()
    return leaves


def _encode_strings(elements: list[Any]) -> bytes:
    parts: list[bytes] = []
    for element in elements:
        try:
            text = as_string(element).encode()
        except JsonTypeError as error:
            raise Internal(f"Unable to parse JSON bytes array: {error}") from None
        parts.append(_LENGTH.pack(len(text)))
        parts.append(text)
    return b"".join(parts)


def _fast_array(elements: list[Any], datatype: DataType) -> bytes | None:
    """The bytes if every element is of a fitting type, else None."""
    kinds = set(map(type, elements))
    if datatype in FLOATING:
        if not kinds <= {float, int}:
            return None
        with np.errstate(over="ignore"):  # 1e39 as FP32 is infinity, as in C
            try:
                return np.array(elements, np.float64).astype(datatype.numpy).tobytes()
            except OverflowError:
                return None
    if datatype is DataType.BOOL:
        return np.array(elements, np.bool_).tobytes() if kinds <= {bool} else None
    if not kinds <= {int}:
        return None
    if not elements:
        return b""
    low, high = min(elements), max(elements)
    if datatype in UNSIGNED:
        if low < 0 or high > MAX_UINT64:
            return None
        return np.array(elements, np.uint64).astype(datatype.numpy).tobytes()  # narrower ones wrap
    if datatype in SIGNED:
        if low < MIN_INT64 or high > MAX_INT64:
            return None
        return np.array(elements, np.int64).astype(datatype.numpy).tobytes()
    return None


def _as_double(value: Any) -> float:
    if type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            pass
    raise JsonTypeError("attempt to access JSON non-number as double")


def _reader(datatype: DataType) -> Callable[[Any], Any]:
    if datatype in FLOATING:
        return _as_double
    if datatype in UNSIGNED:
        return as_unsigned
    return as_bool if datatype is DataType.BOOL else as_signed


def _first_error(elements: list[Any], datatype: DataType, num_expected: int) -> EnginehouseError:
    """What a reader that goes element by element would trip over first."""
    read = _reader(datatype)
    for element in elements[:num_expected]:
        try:
            read(element)
        except JsonTypeError as error:
            return error
    return JsonTypeError("Shape does not match true shape of 'data' field")


def json_from_tensor(tensor: Tensor) -> list[Any]:
    """The elements as Python values; BYTES as text, undecodable bytes replaced.

    Raises InvalidArgument for types without a JSON form.
    """
    values = values_of(tensor)
    return values.tolist() if isinstance(values, np.ndarray) else values


def values_of(tensor: Tensor) -> Values:
    """As `json_from_tensor`, with numbers in an array that `dump_json` takes: floats in the precision of C's double."""
    datatype = tensor.datatype
    if datatype in (DataType.FP16, DataType.BF16):
        raise InvalidArgument(
            f"sending {datatype.wire_name} data via JSON is not supported. Please use the binary data format for output"
        )
    if datatype is DataType.BYTES:
        return [element.decode("utf-8", "replace") for element in tensor.numpy().reshape(-1).tolist()]
    values = np.frombuffer(tensor.host_data(), datatype.numpy)
    return values.astype(np.float64) if datatype is DataType.FP32 else values
