"""Models that can't be loaded say why in the index, on both protocols, and the others are served."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from enginehouse.testing.server import ServerProcess

from .conftest import EXAMPLES

WRONG_TYPE = """
max_batch_size: 2
input { name: "features" data_type: TYPE_INT8 dims: [4] }
output { name: "label" data_type: TYPE_INT64 dims: [1] reshape { } }
"""
REASON_BY_MODEL = {
    "corrupt": r"corrupt/1/model\.onnx is not an ONNX model",
    "missing": r"unable to find .*missing/1/model\.onnx",
    "wrong_type": r"expects datatype TYPE_INT8 for input 'features', model provides TYPE_FP32 \(.*model\.onnx\)",
    "on_gpu": r"on_gpu_0 of model on_gpu (has kind KIND_GPU but no GPUs|specifies invalid or unsupported gpu id 99)",
    "undescribed": r"must specify 'input' in the config, because .*undescribed/1/model\.pt doesn't say",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("broken")
    for model in REASON_BY_MODEL:
        (root / model / "1").mkdir(parents=True)
    (root / "corrupt" / "1" / "model.onnx").write_text("junk")
    (root / "missing" / "config.pbtxt").write_text('backend: "onnxruntime"')
    for model in ("wrong_type", "on_gpu"):
        shutil.copy(EXAMPLES / "iris_trees" / "1" / "model.onnx", root / model / "1")
    (root / "wrong_type" / "config.pbtxt").write_text(WRONG_TYPE)
    (root / "on_gpu" / "config.pbtxt").write_text("instance_group [ { kind: KIND_GPU gpus: [ 99 ] } ]")
    shutil.copy(EXAMPLES / "digits" / "1" / "model.pt", root / "undescribed" / "1")
    shutil.copytree(EXAMPLES / "iris_trees", root / "iris_trees")
    shutil.copy(EXAMPLES / "iris_trees" / "1" / "model.onnx", root / "bare.onnx")
    with ServerProcess([root], ["--exit-on-error=false"], wait_ready=False) as running:
        wait_until_settled(running)
        yield running


def wait_until_settled(server: ServerProcess) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        time.sleep(0.1)
        try:
            with http_client.InferenceServerClient(server.http) as client:
                index = client.get_model_repository_index()
        except OSError:
            continue
        if len(index) == len(REASON_BY_MODEL) + 2 and all(
            one.get("state") in ("READY", "UNAVAILABLE") for one in index
        ):
            return
    raise AssertionError(server.log[-2000:])


@pytest.mark.parametrize("model", REASON_BY_MODEL)
def test_index_says_why_on_both_protocols(server: ServerProcess, model: str) -> None:
    with http_client.InferenceServerClient(server.http) as client:
        by_http = {one["name"]: one.get("reason", "") for one in client.get_model_repository_index()}
    with grpc_client.InferenceServerClient(server.grpc) as client:
        by_grpc = {one.name: one.reason for one in client.get_model_repository_index().models}
    assert re.search(REASON_BY_MODEL[model], by_http[model])
    assert by_grpc[model] == by_http[model]


@pytest.mark.parametrize("model", ["iris_trees", "bare"])
def test_other_models_are_served(server: ServerProcess, model: str) -> None:
    features = http_client.InferInput("features", [1, 4], "FP32")
    features.set_data_from_numpy(np.array([[5.1, 3.5, 1.4, 0.2]], np.float32))
    with http_client.InferenceServerClient(server.http) as client:
        assert client.infer(model, [features]).as_numpy("label").tolist() == [[0]]


def test_request_to_a_broken_model_is_refused_by_name(server: ServerProcess) -> None:
    features = grpc_client.InferInput("features", [1, 4], "FP32")
    features.set_data_from_numpy(np.zeros((1, 4), np.float32))
    with (
        grpc_client.InferenceServerClient(server.grpc) as client,
        pytest.raises(InferenceServerException, match="corrupt"),
    ):
        client.infer("corrupt", [features])
