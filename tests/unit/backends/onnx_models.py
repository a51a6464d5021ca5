"""Small ONNX models for tests, written in a few bytes each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

Dims = Sequence[int | str | None]


def value(name: str, element_type: int, dims: Dims | None) -> Any:
    return helper.make_tensor_value_info(name, element_type, dims)


def save(path: Path, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], *more: Any) -> Path:
    """`more` are initializers."""
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), list(more))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def identity(path: Path, element_type: int = TensorProto.FLOAT, dims: Dims = ("batch", 4)) -> Path:
    """INPUT → OUTPUT."""
    return save(
        path,
        [helper.make_node("Identity", ["INPUT"], ["OUTPUT"])],
        [value("INPUT", element_type, dims)],
        [value("OUTPUT", element_type, dims)],
    )


def scaled(path: Path, default_scale: float = 2.0) -> Path:
    """OUTPUT = INPUT * SCALE, where SCALE may be left out."""
    return save(
        path,
        [helper.make_node("Mul", ["INPUT", "SCALE"], ["OUTPUT"])],
        [value("INPUT", TensorProto.FLOAT, ["batch", 4]), value("SCALE", TensorProto.FLOAT, [1])],
        [value("OUTPUT", TensorProto.FLOAT, ["batch", 4])],
        numpy_helper.from_array(np.array([default_scale], dtype=np.float32), "SCALE"),
    )
