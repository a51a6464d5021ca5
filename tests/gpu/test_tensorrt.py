"""TensorRT plans built here from the example models, against ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf import text_format

from enginehouse.backend import LoadContext, Placement
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.types import Tensor
from enginehouse_backends.onnx_runtime import OnnxRuntimeBackend
from enginehouse_backends.tensorrt_engine import TensorRTBackend
from enginehouse_backends.tensorrt_engine.convert import convert
from tests.acceptance.conftest import EXAMPLES

from .test_backends import GPU, TF32_TOLERANCE, instance_of, token_inputs

pytest.importorskip("tensorrt")
SHAPES = ("--shapes", "input_ids=1x1:8x32:32x128", "--shapes", "attention_mask=1x1:8x32:32x128")


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilm")
    (folder / "1").mkdir()
    source, target = EXAMPLES / "minilm" / "1" / "model.onnx", folder / "1" / "model.plan"
    cache = folder / "timing.cache"
    answer = CliRunner().invoke(convert, [str(source), str(target), *SHAPES, "--timing-cache", str(cache)])
    assert answer.exit_code == 0, answer.output
    assert cache.stat().st_size
    return folder


def plan_instance(folder: Path, text: str = "") -> Any:
    config: ModelConfig = text_format.Parse(f'name: "m" instance_group {{ kind: KIND_GPU }} {text}', ModelConfig())
    backend = TensorRTBackend()
    context = LoadContext(config, 1, folder)
    context = LoadContext(backend.complete_config(context), 1, folder)
    return backend.load(context).create_instance(Placement("m_0", GPU))


def reference(inputs: dict[str, Tensor]) -> Any:
    text = (EXAMPLES / "minilm" / "config.pbtxt").read_text()
    instance = instance_of(OnnxRuntimeBackend(), EXAMPLES / "minilm", text, "cpu")
    return instance.run(inputs, [])["last_hidden_state"].numpy()


def assert_same(answer: Any, inputs: dict[str, Tensor]) -> None:
    mask = inputs["attention_mask"].numpy().astype(bool)
    np.testing.assert_allclose(answer.numpy()[mask], reference(inputs)[mask], atol=TF32_TOLERANCE)


def test_config_is_completed_from_the_plan(minilm: Path) -> None:
    context = LoadContext(text_format.Parse('name: "m"', ModelConfig()), 1, minilm)
    completed = TensorRTBackend().complete_config(context)
    assert completed.max_batch_size == 32
    assert [list(tensor.dims) for tensor in completed.output] == [[-1, 384]]


def test_batches_of_many_shapes_answer_as_on_the_cpu(minilm: Path) -> None:
    instance = plan_instance(minilm)
    for lengths in ([5], [40, 3, 17], [128] * 4, [1]):
        inputs = token_inputs(lengths)
        assert_same(instance.run(inputs, [])["last_hidden_state"], inputs)
    with pytest.raises(InvalidArgument, match="no optimization profile"):
        instance.run(token_inputs([129]), [])


def test_cuda_graph_answers_as_without(minilm: Path) -> None:
    dims = " ".join(f'input {{ key: "{name}" value {{ dim: [32] }} }}' for name in ("input_ids", "attention_mask"))
    text = f"optimization {{ cuda {{ graphs: true graph_spec {{ batch_size: 4 {dims} }} }} }}"
    instance = plan_instance(minilm, text)
    assert len(instance._graphs) == 1
    for lengths in ([32, 5, 6, 7], [32, 1, 32, 2]):
        inputs = token_inputs(lengths)
        assert_same(instance.run(inputs, [])["last_hidden_state"], inputs)


def test_streams_and_copies_of_their_own_change_no_answer(minilm: Path) -> None:
    text = """optimization { priority: PRIORITY_MAX cuda { output_copy_stream: true busy_wait_events: true }
    input_pinned_memory { enable: false } output_pinned_memory { enable: false } }"""
    inputs = token_inputs([9, 30])
    assert_same(plan_instance(minilm, text).run(inputs, [])["last_hidden_state"], inputs)


def test_file_that_is_no_plan_is_refused_with_tensorrts_reason(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.plan").write_bytes(b"no plan" * 100)
    with pytest.raises(InvalidArgument, match=r"can't load .*model\.plan"):
        plan_instance(tmp_path)
