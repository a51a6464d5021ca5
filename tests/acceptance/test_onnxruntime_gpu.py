"""onnxruntime-gpu on a machine without a GPU: what of the CUDA and TensorRT providers can be checked there.

It excludes onnxruntime, so it needs an environment of its own, named by its Python:
    python -m venv ort && ort/bin/pip install onnxruntime-gpu numpy protobuf
    ENGINEHOUSE_ORT_GPU_PYTHON=ort/bin/python python -m pytest tests/acceptance/test_onnxruntime_gpu.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import enginehouse
import enginehouse_backends
from tests.unit.backends import onnx_models

PYTHON = os.environ.get("ENGINEHOUSE_ORT_GPU_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="ENGINEHOUSE_ORT_GPU_PYTHON names no Python with onnxruntime-gpu")

SCRIPT = """
import json, sys
from pathlib import Path
from google.protobuf import text_format
from enginehouse.backend import LoadContext, Placement
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError
from enginehouse_backends.onnx_runtime import OnnxRuntimeBackend

folder, text, device = sys.argv[1:]
backend = OnnxRuntimeBackend()
config = text_format.Parse('name: "m" ' + text, ModelConfig())
context = LoadContext(config, 1, Path(folder))
context = LoadContext(backend.complete_config(context), 1, Path(folder))
try:
    instance = backend.load(context).create_instance(Placement("m_0", device))
    print(json.dumps({"providers": instance._session.get_providers()}))
except EnginehouseError as problem:
    print(json.dumps({"error": type(problem).__name__, "text": str(problem)}))
"""


def load(folder: Path, text: str = "", device: str = "cuda:0") -> Any:
    onnx_models.identity(folder / "1" / "model.onnx")
    roots = [str(Path(str(package.__file__)).parents[1]) for package in (enginehouse, enginehouse_backends)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    answer = subprocess.run(
        [PYTHON, "-c", SCRIPT, str(folder), text, device], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(answer.stdout.splitlines()[-1])


def provider_binary(name: str) -> bytes:
    find = "import onnxruntime; print(onnxruntime.__file__)"
    package = Path(subprocess.run([PYTHON, "-c", find], capture_output=True, text=True, check=True).stdout.strip())
    return (package.parent / "capi" / f"libonnxruntime_providers_{name}.so").read_bytes()


@pytest.mark.parametrize(
    ("provider", "names"),
    [
        (
            "cuda",
            ["device_id", "gpu_mem_limit", "arena_extend_strategy", "cudnn_conv_algo_search", "kSameAsRequested",
             "kNextPowerOfTwo", "do_copy_in_default_stream", "EXHAUSTIVE", "HEURISTIC", "DEFAULT"],
        ),
        (
            "tensorrt",
            ["device_id", "trt_fp16_enable", "trt_int8_enable", "trt_max_workspace_size",
             "trt_int8_calibration_table_name", "trt_int8_use_native_calibration_table", "trt_engine_cache_enable"],
        ),
    ],
)  # fmt: skip
def test_options_that_we_write_are_known_to_the_provider(provider: str, names: list[str]) -> None:
    binary = provider_binary(provider)
    assert [name for name in names if b"\0" + name.encode() + b"\0" not in binary] == []


def test_gpu_that_is_not_there_is_an_error_that_names_the_libraries(tmp_path: Path) -> None:
    answer = load(tmp_path)
    assert answer["error"] == "Unsupported"
    assert "CUDAExecutionProvider can't start on cuda:0" in answer["text"]
    assert "Failed to load libcublas" in answer["text"]


def test_tensorrt_that_is_not_there_is_an_error_and_no_fallback(tmp_path: Path) -> None:
    text = 'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }'
    answer = load(tmp_path, text)
    assert "error" in answer
    assert "TensorRT" in answer["text"] or "Tensorrt" in answer["text"]


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_the_same_build_serves_the_cpu(tmp_path: Path, device: str) -> None:
    assert load(tmp_path, device=device) == {"providers": ["CPUExecutionProvider"]}
