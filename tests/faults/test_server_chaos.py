"""A whole server under load while workers are killed and models reloaded: what is sent is answered.

Real clients, real processes. Requests sent = answers received is counted in every test.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import tritonclient.grpc as grpc
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from enginehouse.testing.server import ServerProcess

NUM_CLIENTS = 16
MODEL = """
import ctypes, os, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
            if x[0, 0] == -2:
                ctypes.string_at(0)
            time.sleep(0.002)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", x * 2)]))
        return answers
"""
CONFIG = """
max_batch_size: 8 dynamic_batching {}
input [{ name: "X" data_type: TYPE_FP32 dims: [2] }] output [{ name: "Y" data_type: TYPE_FP32 dims: [2] }]
serving { HOST supervision { max_restarts: 1000 backoff_initial_s: 0.05 backoff_max_s: 0.05 } }
"""


def write_python(root: Path, name: str) -> None:
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / "model.py").write_text(MODEL)
    (root / name / "config.pbtxt").write_text('backend: "python"' + CONFIG.replace("HOST", ""))


def write_onnx(root: Path, name: str, host: str) -> None:
    (root / name / "1").mkdir(parents=True)
    shape: list[str | int | None] = ["N", 2]
    graph = helper.make_graph(
        [helper.make_node("Add", ["X", "X"], ["Y"])],
        "double",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, shape)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 9
    onnx.save(made, root / name / "1" / "model.onnx")
    (root / name / "config.pbtxt").write_text('backend: "onnxruntime"' + CONFIG.replace("HOST", f"host: {host}"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("models")
    write_python(root, "steady")
    write_python(root, "crashing")
    write_onnx(root, "onnx_thread", "HOST_THREAD")
    write_onnx(root, "onnx_process", "HOST_PROCESS")
    with ServerProcess([root], ["--model-control-mode=explicit", "--load-model=*"]) as running:
        yield running


class Load:
    """Clients that ask one model as fast as they are answered, until told to stop."""

    def __init__(self, server: ServerProcess, model: str) -> None:
        self.sent = 0
        self.answers: Counter[str] = Counter()
        self._server = server
        self._model = model
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(NUM_CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads), "somebody was never answered"
        assert self.sent == sum(self.answers.values())

    def _ask(self, number: int) -> None:
        with grpc.InferenceServerClient(self._server.grpc) as client:
            while not self._stop.is_set():
                with self._lock:
                    self.sent += 1
                answer = infer(client, self._model, number + 1)
                with self._lock:
                    self.answers[answer] += 1
                if answer != "right":
                    time.sleep(0.01)


def infer(client: grpc.InferenceServerClient, model: str, value: float) -> str:
    """ "right", "wrong" or the error's text."""
    tensor = grpc.InferInput("X", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.full((1, 2), value, np.float32))
    try:
        answer = client.infer(model, [tensor], client_timeout=20)
    except InferenceServerException as problem:
        return str(problem.message())
    return "right" if answer.as_numpy("Y").tolist() == [[2 * value] * 2] else "wrong"


def workers_of(server: ServerProcess) -> set[int]:
    return {child.pid for child in psutil.Process(server.pid).children()}


def is_ready(server: ServerProcess, model: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{server.http}/v2/models/{model}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_at, "it did not happen within 20 s"
        time.sleep(0.01)


def crash(server: ServerProcess, model: str) -> str:
    with grpc.InferenceServerClient(server.grpc) as client:
        return infer(client, model, -2)


def test_a_model_that_keeps_crashing_is_answered_for_and_its_neighbours_dont_notice(server: ServerProcess) -> None:
    with Load(server, "steady") as steady, Load(server, "onnx_thread") as onnx_load, Load(server, "crashing") as other:
        for _ in range(5):
            wait_for(lambda: is_ready(server, "crashing"))
            assert "was killed by signal 11 (SIGSEGV)" in crash(server, "crashing")
            assert server.is_ready() or not is_ready(server, "crashing")
    assert set(steady.answers) == {"right"}
    assert set(onnx_load.answers) == {"right"}
    assert other.answers["right"] > 0
    assert other.answers["wrong"] == 0
    wait_for(lambda: is_ready(server, "crashing"))


def test_onnx_in_a_process_is_protected_and_onnx_in_a_thread_stays(server: ServerProcess) -> None:
    wait_for(lambda: is_ready(server, "onnx_process"))
    with Load(server, "onnx_process") as in_process, Load(server, "onnx_thread") as in_thread:
        victims = [
            pid for pid in workers_of(server) if any("onnxruntime" in m.path for m in psutil.Process(pid).memory_maps())
        ]
        [pid] = victims
        psutil.Process(pid).kill()
        wait_for(lambda: not psutil.pid_exists(pid))
        wait_for(lambda: is_ready(server, "onnx_process"))
        right = in_process.answers["right"]
        wait_for(lambda: in_process.answers["right"] > right + 100)
    assert set(in_thread.answers) == {"right"}
    assert in_process.answers["wrong"] == 0
    texts = " ".join(text for text in in_process.answers if text != "right")
    assert "SIGKILL" in texts


@pytest.mark.parametrize("model", ["steady", "onnx_process", "onnx_thread"])
def test_reloading_under_full_load_fails_no_request(server: ServerProcess, model: str) -> None:
    wait_for(lambda: is_ready(server, model))
    with Load(server, model) as load, grpc.InferenceServerClient(server.grpc) as client:
        for number in range(5):
            # Another instance count alone would be changed in place; a parameter makes it a load.
            parameters = {"parameters": {"round": {"string_value": str(number)}}}
            client.load_model(model, config=json.dumps(model_config(server, model) | parameters))
            seen = load.answers["right"]
            wait_for(lambda seen=seen: load.answers["right"] > seen + 50)  # type: ignore[misc]
    assert set(load.answers) == {"right"}, load.answers


def model_config(server: ServerProcess, model: str) -> dict[str, object]:
    with urllib.request.urlopen(f"http://{server.http}/v2/models/{model}/config", timeout=5) as answer:
        config: dict[str, object] = json.load(answer)
        return config


def test_changing_the_instance_count_under_load_happens_in_place(server: ServerProcess) -> None:
    wait_for(lambda: is_ready(server, "steady"))
    before = workers_of(server)
    config = model_config(server, "steady")
    with Load(server, "steady") as load, grpc.InferenceServerClient(server.grpc) as client:
        for count in (3, 1):
            config["instance_group"] = [{"name": "steady", "kind": "KIND_CPU", "count": count}]
            client.load_model("steady", config=json.dumps(config))
            seen = load.answers["right"]
            wait_for(lambda seen=seen: load.answers["right"] > seen + 50)  # type: ignore[misc]
            assert len(workers_of(server)) == len(before) + count - 1
    assert workers_of(server) == before
    assert set(load.answers) == {"right"}, load.answers


def test_restarts_are_counted(server: ServerProcess) -> None:
    with urllib.request.urlopen(server.metrics_url, timeout=5) as answer:
        text = answer.read().decode()
    counted = {line.split("{")[1].split('"')[1]: float(line.split()[-1]) for line in text.splitlines()
               if line.startswith("enginehouse_host_restarts_total{")}  # fmt: skip
    assert counted["crashing"] >= 5
    assert counted["steady"] == 0
