"""SageMaker's and Vertex AI's routes, as their gateways call them."""

from __future__ import annotations

import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as http_client

from enginehouse.testing.server import ServerProcess, free_port

from .conftest import MODELS

FLOATS = np.arange(8, dtype=np.float32).reshape(2, 4)


def ask(method: str, url: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, body or None, named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def binary_request() -> tuple[bytes, int]:
    tensor = http_client.InferInput("IN", list(FLOATS.shape), "FP32")
    tensor.set_data_from_numpy(FLOATS)
    output = http_client.InferRequestedOutput("OUT", binary_data=True)
    body, length = http_client.InferenceServerClient.generate_request_body([tensor], outputs=[output])
    return body, length


def check_binary(vendor: str, headers: dict[str, str], body: bytes) -> None:
    prefix = f"application/vnd.{vendor}-triton.binary+json;json-header-size="
    assert headers["Content-Type"].startswith(prefix)
    length = int(headers["Content-Type"].removeprefix(prefix))
    result = http_client.InferenceServerClient.parse_response_body(body, header_length=length)
    assert (result.as_numpy("OUT") == FLOATS).all()


@pytest.fixture(scope="module")
def sagemaker() -> Iterator[str]:
    port = free_port()
    flags = ["--model-control-mode=explicit", "--load-model=echo", "--allow-sagemaker=true"]
    environment = {"SAGEMAKER_TRITON_DEFAULT_MODEL_NAME": "echo", "SAGEMAKER_MULTI_MODEL": "true"}
    with ServerProcess([MODELS], [*flags, f"--sagemaker-port={port}"], environment=environment):
        yield f"http://127.0.0.1:{port}"


def test_sagemaker_pings_and_invokes(sagemaker: str) -> None:
    assert ask("GET", f"{sagemaker}/ping")[0] == 200
    document = {"inputs": [{"name": "IN", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
    status, _, body = ask("POST", f"{sagemaker}/invocations", json.dumps(document).encode())
    assert (status, json.loads(body)["outputs"][0]["data"]) == (200, [1.0, 2.0])
    body, length = binary_request()
    content_type = f"application/vnd.sagemaker-triton.binary+json;json-header-size={length}"
    status, headers, answer = ask("POST", f"{sagemaker}/invocations", body, Content_Type=content_type)
    assert status == 200
    check_binary("sagemaker", headers, answer)
    assert ask("GET", f"{sagemaker}/v2")[0] == 400


def test_sagemaker_models_come_and_go(sagemaker: str, tmp_path: Path) -> None:
    folder = tmp_path / "0123456789abcdef" / "model"
    shutil.copytree(MODELS / "echo", folder / "inner")
    load = json.dumps({"model_name": "mme-1", "url": str(folder)}).encode()
    assert ask("POST", f"{sagemaker}/models", load)[0] == 200
    assert ask("POST", f"{sagemaker}/models", load)[0] == 409
    described = {"modelName": "mme-1", "modelUrl": str(folder.parent)}
    assert json.loads(ask("GET", f"{sagemaker}/models")[2]) == {"models": [described]}
    assert json.loads(ask("GET", f"{sagemaker}/models/mme-1")[2]) == described
    body, length = binary_request()
    content_type = f"application/vnd.sagemaker-triton.binary+json;json-header-size={length}"
    status, headers, answer = ask("POST", f"{sagemaker}/models/mme-1/invoke", body, Content_Type=content_type)
    assert status == 200
    check_binary("sagemaker", headers, answer)
    assert ask("POST", f"{sagemaker}/models/mme-1/invoke", b"{}")[0] == 400
    assert ask("DELETE", f"{sagemaker}/models/mme-1")[0] == 200
    for method, path in (("DELETE", "/models/mme-1"), ("GET", "/models/mme-1"), ("POST", "/models/mme-1/invoke")):
        assert ask(method, sagemaker + path, b"{}")[0] == 404
    assert json.loads(ask("GET", f"{sagemaker}/models")[2]) == {"models": []}


def test_sagemaker_refuses_folders_without_a_model(sagemaker: str, tmp_path: Path) -> None:
    for url in (str(tmp_path), "/proc/self", "/nowhere"):
        load = json.dumps({"model_name": "bad", "url": url}).encode()
        assert ask("POST", f"{sagemaker}/models", load)[0] == 400
    assert ask("GET", f"{sagemaker}/models/bad")[0] == 404


@pytest.fixture(scope="module")
def vertex() -> Iterator[str]:
    environment = {
        "AIP_MODE": "PREDICTION",
        "AIP_HTTP_PORT": str(free_port()),
        "AIP_PREDICT_ROUTE": "/predict",
        "AIP_HEALTH_ROUTE": "/health",
    }
    flags = ["--vertex-ai-default-model=echo", "--allow-http=true"]
    with ServerProcess([MODELS], flags, environment=environment):
        yield f"http://127.0.0.1:{environment['AIP_HTTP_PORT']}"


def redirected(url: str, path: str, document: Any = None) -> tuple[int, Any]:
    body = b"{}" if document is None else json.dumps(document).encode()
    status, _, answer = ask("POST", f"{url}/predict", body, X_Vertex_Ai_Triton_Redirect=path)
    return status, json.loads(answer) if answer[:1] in (b"{", b"[") else answer.decode()


def test_vertex_predicts_with_the_default_model(vertex: str) -> None:
    assert ask("GET", f"{vertex}/health")[0] == 200
    body, length = binary_request()
    content_type = f"application/vnd.vertex-ai-triton.binary+json;json-header-size={length}"
    status, headers, answer = ask("POST", f"{vertex}/predict", body, Content_Type=content_type)
    assert status == 200
    check_binary("vertex-ai", headers, answer)


def test_vertex_sends_predictions_on_to_any_endpoint(vertex: str) -> None:
    document = {"inputs": [{"name": "IN", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}]}
    status, answer = redirected(vertex, "v2/models/echo_text/infer", document)
    assert (status, answer["outputs"][0]["data"]) == (200, ["a", "b"])
    assert redirected(vertex, "v2")[1]["name"] == "triton"
    assert redirected(vertex, "v2/health/ready") == (200, "")
    assert redirected(vertex, "v2/models/echo/config")[1]["max_batch_size"] == 8
    assert redirected(vertex, "v2/models/stats")[0] == 200
    assert {entry["name"] for entry in redirected(vertex, "v2/repository/index")[1]} >= {"echo", "repeat"}
    assert re.search(r"nv_inference_request_success\{.*echo", redirected(vertex, "metrics")[1])
    assert redirected(vertex, "v2/systemsharedmemory/status")[0] in (200, 501)
    assert redirected(vertex, "nothing")[0] == 400
    assert ask("GET", f"{vertex}/predict")[0] == 405
    assert ask("GET", f"{vertex}/elsewhere")[0] == 400


ROUTES = {"AIP_PREDICT_ROUTE": "/predict", "AIP_HEALTH_ROUTE": "/health"}


@pytest.mark.parametrize(
    ("environment", "flags", "text"),
    [
        ({"AIP_HEALTH_ROUTE": "/health"}, [], "API_PREDICT_ROUTE is not defined for Vertex AI endpoint"),
        ({"AIP_PREDICT_ROUTE": "/predict"}, [], "AIP_HEALTH_ROUTE is not defined for Vertex AI endpoint"),
        (ROUTES, ["--vertex-ai-default-model=nobody"], "Expect the default model 'nobody' is loaded"),
        (ROUTES, [], "Expect the model repository contains only a single model if default model is not specified"),
    ],
)
def test_vertex_does_not_start_without_what_it_needs(environment: dict[str, str], flags: list[str], text: str) -> None:
    flags = ["--model-control-mode=explicit", "--allow-vertex-ai=true", f"--vertex-ai-port={free_port()}", *flags]
    with ServerProcess([MODELS], flags, environment=environment, wait_ready=False) as server:
        assert server.process is not None
        assert server.process.wait(60) == 1
        assert f"error: failed to start Vertex AI service: Invalid argument - {text}" in server.log
        assert "Traceback" not in server.log
