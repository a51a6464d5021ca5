"""The backends under test, each with a way to write small models of its format.

A subject's model batches along the first axis and answers `output_name` from `input_name` alone.
"""

from __future__ import annotations

import re
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from enginehouse.backend import Backend
from enginehouse.types import DataType
from enginehouse_backends.onnx_runtime import ELEMENT_TYPE_BY_DATATYPE, OnnxRuntimeBackend
from enginehouse_backends.python_model import PythonBackend
from enginehouse_backends.pytorch import PyTorchBackend
from enginehouse_backends.pytorch.instance import TORCH_BY_DATATYPE
from enginehouse_backends.transformers_task import TransformersBackend
from tests.unit.backends import hugging_face_folders, onnx_models, torch_models

WIDTH = 4
"""Columns of the sample inputs."""


class Subject(ABC):
    name: str
    artifact: str
    input_name = "INPUT"
    output_name = "OUTPUT"
    datatypes: Sequence[DataType] = (DataType.FP32,)
    names_only_in_config = False
    """True if the format doesn't say what its tensors are, so the config can't contradict it."""
    is_code = False
    """True if the artifact is the user's program: nothing can be said of it but by running it, and checking
    requests is left to the core."""
    checks_shapes = True

    @property
    def datatype(self) -> DataType:
        """What tests use that need but one."""
        return DataType.FP32 if DataType.FP32 in self.datatypes else self.datatypes[0]

    @abstractmethod
    def backend(self) -> Backend: ...

    @abstractmethod
    def build(self, folder: Path, datatype: DataType) -> str:
        """Writes version 1; gives back the config's text, as short as may be."""

    @abstractmethod
    def build_heavy(self, folder: Path, num_bytes: int) -> str:
        """The same for `datatype`, with at least so many bytes of weights."""

    def expected(self, array: Any) -> Any:
        """What the model makes of the input; None if only the model can tell."""
        return array

    def sample(self, datatype: DataType, num_rows: int) -> Any:
        """Rows that differ; for strings also empty ones and ones that are no ASCII."""
        if datatype is DataType.BYTES:
            words = ["", "a", "grün", "long " * 50, "\t\n", "x\x00y"]
            rows = [[words[(row + column) % len(words)].encode() for column in range(WIDTH)] for row in range(num_rows)]
            return np.array(rows, dtype=object).reshape(num_rows, WIDTH)
        counted = np.arange(num_rows * WIDTH).reshape(num_rows, WIDTH)
        return (counted % 2 if datatype is DataType.BOOL else counted % 120).astype(datatype.numpy)

    def __str__(self) -> str:
        return self.name


def config_text(subject: Subject, datatype: DataType) -> str:
    kind = datatype.config_name
    return (
        f'max_batch_size: 64 input {{ name: "{subject.input_name}" data_type: {kind} dims: [{WIDTH}] }} '
        f'output {{ name: "{subject.output_name}" data_type: {kind} dims: [{WIDTH}] }}'
    )


class OnnxSubject(Subject):
    name = "onnxruntime"
    artifact = "model.onnx"
    datatypes = tuple(member for member in DataType if member is not DataType.INVALID)

    def backend(self) -> Backend:
        return OnnxRuntimeBackend()

    def build(self, folder: Path, datatype: DataType) -> str:
        onnx_models.identity(folder / "1" / "model.onnx", ELEMENT_TYPE_BY_DATATYPE[datatype])
        return "max_batch_size: 64"

    def build_heavy(self, folder: Path, num_bytes: int) -> str:
        weight = np.zeros((num_bytes // 4 // WIDTH, WIDTH), dtype=np.float32)
        nodes = [
            helper.make_node("ReduceSum", ["W"], ["sum"], keepdims=0),
            helper.make_node("Add", ["INPUT", "sum"], ["OUTPUT"]),
        ]
        tensors = [[onnx_models.value(name, TensorProto.FLOAT, ["batch", WIDTH])] for name in ("INPUT", "OUTPUT")]
        onnx_models.save(folder / "1" / "model.onnx", nodes, *tensors, numpy_helper.from_array(weight, "W"))
        return "optimization { graph { level: 2 } }"  # else ONNX Runtime folds the weights away


class TorchScriptSubject(Subject):
    name = "torchscript"
    artifact = "model.pt"
    datatypes = tuple(TORCH_BY_DATATYPE)
    names_only_in_config = True
    checks_shapes = False

    def backend(self) -> Backend:
        return PyTorchBackend()

    def build(self, folder: Path, datatype: DataType) -> str:
        torch_models.save_script(folder / "1" / "model.pt", torch_models.Identity())
        return config_text(self, datatype)

    def build_heavy(self, folder: Path, num_bytes: int) -> str:
        torch_models.save_script(folder / "1" / "model.pt", torch_models.Heavy(num_bytes))
        return config_text(self, DataType.FP32)


class TorchExportSubject(Subject):
    name = "torch.export"
    artifact = "model.pt2"
    datatypes = tuple(TORCH_BY_DATATYPE)

    def backend(self) -> Backend:
        return PyTorchBackend()

    def build(self, folder: Path, datatype: DataType) -> str:
        sample = torch.zeros(2, WIDTH).to(TORCH_BY_DATATYPE[datatype])
        program = torch_models.exported(torch_models.IdentityByName(), sample)
        torch_models.save_export(folder / "1" / "model.pt2", program)
        return "max_batch_size: 64"

    def build_heavy(self, folder: Path, num_bytes: int) -> str:
        program = torch_models.exported(torch_models.HeavyByName(num_bytes), torch.zeros(2, WIDTH))
        torch_models.save_export(folder / "1" / "model.pt2", program)
        return "max_batch_size: 64"


class PythonSubject(Subject):
    name = "python"
    artifact = "model.py"
    datatypes = tuple(one for one in DataType if one not in (DataType.BF16, DataType.INVALID))  # numpy has none
    names_only_in_config = True
    is_code = True
    checks_shapes = False

    def backend(self) -> Backend:
        """As in a fresh process, which is what each model.py gets."""
        for name in [name for name in sys.modules if name in ("1", "1.model")]:
            del sys.modules[name]
        sys.path[:] = [entry for entry in sys.path if Path(entry).name != "1" and not (Path(entry) / "1").is_dir()]
        sys.path_importer_cache.clear()
        return PythonBackend()

    def build(self, folder: Path, datatype: DataType) -> str:
        return self._write(folder, datatype, 0)

    def build_heavy(self, folder: Path, num_bytes: int) -> str:
        return self._write(folder, DataType.FP32, num_bytes)

    def _write(self, folder: Path, datatype: DataType, num_bytes: int) -> str:
        (folder / "1").mkdir(parents=True, exist_ok=True)
        (folder / "1" / "model.py").write_text(PYTHON_SOURCE.format(num_bytes=num_bytes))
        return config_text(self, datatype)


PYTHON_SOURCE = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.weights = np.zeros({num_bytes}, np.uint8) + 0

    def execute(self, requests):
        return [pb_utils.InferenceResponse([self.answer(request)]) for request in requests]

    def answer(self, request):
        return pb_utils.Tensor("OUTPUT", pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy())
"""


class TransformersSubject(Subject):
    name = "transformers"
    artifact = "model.safetensors"
    input_name = "text"
    output_name = "embedding"
    datatypes = (DataType.BYTES,)

    def backend(self) -> Backend:
        return TransformersBackend()

    def build(self, folder: Path, datatype: DataType) -> str:
        hugging_face_folders.write_bert(folder / "1", "BertModel")
        return "max_batch_size: 64"

    def build_heavy(self, folder: Path, num_bytes: int) -> str:
        hugging_face_folders.write_bert(folder / "1", "BertModel", intermediate_size=num_bytes // 4 // 32 // 4 + 1)
        return "max_batch_size: 64"

    def sample(self, datatype: DataType, num_rows: int) -> Any:
        texts = ["the cat", "", "a dog sits on the mat", "grün", "how long is bread baked in berlin " * 20]
        rows = [[texts[row % len(texts)].encode()] for row in range(num_rows)]
        return np.array(rows, dtype=object).reshape(num_rows, 1)

    def expected(self, array: Any) -> Any:
        return None


class LinearSubject(Subject):
    """The example of docs/write-a-backend.md, as it stands there."""

    name = "docs/write-a-backend.md"
    artifact = "model.npz"
    input_name = "features"
    output_name = "targets"

    def backend(self) -> Backend:
        backend: Backend = documented_module().LinearBackend()
        return backend

    def build(self, folder: Path, datatype: DataType) -> str:
        return self.build_heavy(folder, 0)

    def build_heavy(self, folder: Path, num_bytes: int) -> str:
        (folder / "1").mkdir(parents=True, exist_ok=True)
        weight = np.zeros((WIDTH, max(3, num_bytes // 4 // WIDTH)), np.float32)
        weight[:, :3] = np.arange(12).reshape(WIDTH, 3)
        np.savez(folder / "1" / "model.npz", weight=weight, bias=np.ones(weight.shape[1], np.float32))
        return "max_batch_size: 64"

    def expected(self, array: Any) -> Any:
        return array @ np.arange(12, dtype=np.float32).reshape(WIDTH, 3) + 1


DOCUMENT = Path(__file__).parents[3] / "docs" / "write-a-backend.md"


def documented_code() -> str:
    found = re.search(r"```python file=linear_backend\.py\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def documented_module() -> types.ModuleType:
    if "linear_backend" not in sys.modules:
        module = types.ModuleType("linear_backend")
        exec(compile(documented_code(), str(DOCUMENT), "exec"), module.__dict__)
        sys.modules["linear_backend"] = module
    return sys.modules["linear_backend"]


SUBJECTS: list[Subject] = [
    PythonSubject(),
    OnnxSubject(),
    TorchScriptSubject(),
    TorchExportSubject(),
    TransformersSubject(),
    LinearSubject(),
]
