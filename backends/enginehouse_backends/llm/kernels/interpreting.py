"""Triton's interpreter, made right for what the kernels use: simulated GPUs run them so, and so do tests.

TRITON_INTERPRET=1 must be set before the kernels' modules are imported.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot
_cast = interpreter.InterpreterBuilder.cast_impl
_patch_lang_tensor = interpreter._patch_lang_tensor

_NUMPY = {
    tl.float64: np.dtype(np.float64),
    tl.float32: np.dtype(np.float32),
    tl.float16: np.dtype(np.float16),
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.float8e5: np.dtype(ml_dtypes.float8_e5m2),
}


def install() -> None:
    """Mends faults of Triton 3.6's interpreter, each of which a device does right.

    It multiplies bfloat16's raw 16-bit integers in `dot`, truncates where a device rounds to nearest, and
    since numpy 2.4 can't use a loaded scalar as a loop bound (an array of one element is no int any more).
    """
    builder = interpreter.InterpreterBuilder
    builder.create_dot = _dot_of_values
    builder.cast_impl = _cast_to_nearest
    builder.create_fp_to_fp = lambda self, source, target, mode: _cast_to_nearest(self, source, target)
    interpreter._patch_lang_tensor = _patch_with_scalar_index


def _values(handle: Any) -> Any:
    return handle.data.view(_NUMPY[handle.dtype.scalar])


def _cast_to_nearest(builder: Any, source: Any, target: Any) -> Any:
    """Overflow of float8_e4m3fn becomes NaN here (a device saturates): kernels must clamp by themselves."""
    found, wanted = source.dtype.scalar, target.scalar
    if found not in _NUMPY or wanted not in _NUMPY:
        if found in _NUMPY and found.primitive_bitwidth <= 16:
            source = _cast_to_nearest(builder, source, tl.float32)
        elif wanted in _NUMPY and wanted.primitive_bitwidth <= 16:
            return _cast_to_nearest(builder, _cast(builder, source, tl.float32), target)
        return _cast(builder, source, target)
    raw = interpreter._get_np_dtype(wanted)
    with np.errstate(over="ignore", invalid="ignore"):
        return interpreter.TensorHandle(_values(source).astype(_NUMPY[wanted]).view(raw), wanted)


def _dot_of_values(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
    return _create_dot(builder, _widened(a), _widened(b), d, input_precision, imprecise)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar not in (tl.bfloat16, tl.float8e4nv, tl.float8e5):
        return handle
    return interpreter.TensorHandle(_values(handle).astype(np.float32), tl.float32)


def _patch_with_scalar_index(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
