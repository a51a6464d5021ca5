"""Models without a config and without version folders serve, whatever form they were dropped in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.http as http
from onnx import TensorProto, helper, numpy_helper

from enginehouse.testing.server import ServerProcess


def adder(added: float) -> onnx.ModelProto:
    """Adds a constant to x: [batch, 1]."""
    constant = numpy_helper.from_array(np.full([1], added, np.float32), "c")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"])],
        "adder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
        [constant],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("flat", "versioned/1", "named/1"):
        (tmp_path / name).mkdir(parents=True)
    onnx.save(adder(1), str(tmp_path / "bare.onnx"))
    onnx.save(
        adder(2),
        str(tmp_path / "big.onnx"),
        save_as_external_data=True,
        location="big.onnx.data",
        size_threshold=0,
    )
    onnx.save(adder(3), str(tmp_path / "flat" / "model.onnx"))
    onnx.save(adder(4), str(tmp_path / "versioned" / "1" / "model.onnx"))
    onnx.save(adder(5), str(tmp_path / "named" / "1" / "net.onnx"))
    return tmp_path


@pytest.mark.parametrize(
    ("filename", "content"),
    [
        ("config.pbtxt", "max_batch_size: 3 version_policy { all { } } response_cache { enable: false }"),
        ("config.yaml", "max_batch_size: 3\nversion_policy: {all: true}\nresponse_cache: false\n"),
        ("config.json", '{"max_batch_size": 3, "versionPolicy": {"all": {}}, "response_cache": {}}'),
        ("configs/three.yml", "max_batch_size: 3\nversion_policy: {all: {}}\nresponse_cache: {}\n"),
    ],
)
def test_every_spelling_serves(tmp_path: Path, filename: str, content: str) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "configs").mkdir()
    (tmp_path / "m" / filename).write_text(content)
    onnx.save(adder(1), str(tmp_path / "m" / "1" / "model.onnx"))
    flags = ["--model-config-name=three"]
    with ServerProcess([tmp_path], flags) as server, http.InferenceServerClient(server.http) as client:
        config = client.get_model_config("m")
        assert (config["max_batch_size"], config["version_policy"]) == (3, {"all": {}})
        assert config["response_cache"] == {"enable": False}
        assert config["input"][0]["dims"] == [1]


def test_every_layout_answers(repository: Path) -> None:
    assert (repository / "big.onnx.data").is_file()
    with ServerProcess([repository]) as server, http.InferenceServerClient(server.http) as client:
        answers = {}
        for name in ("bare", "big", "flat", "versioned", "named"):
            tensor = http.InferInput("x", [1, 1], "FP32")
            tensor.set_data_from_numpy(np.zeros([1, 1], np.float32))
            answers[name] = float(client.infer(name, [tensor]).as_numpy("y")[0, 0])
        assert answers == {"bare": 1, "big": 2, "flat": 3, "versioned": 4, "named": 5}
        assert client.get_model_config("bare")["default_model_filename"] == "bare.onnx"
        assert client.get_model_metadata("flat")["versions"] == ["1"]
