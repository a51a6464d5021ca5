"""Unloading ends, whatever a model does: what hangs is ended or named, and the state tells the truth."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import tritonclient.http as http
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from enginehouse.testing.server import ServerProcess

MODEL = """
import os, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
            if x[0, 0] < 0:
                time.sleep(1000)
            if x[0, 0] > 1:
                time.sleep(float(x[0, 0]) / 10)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([[os.getpid()]], np.int32))]))
        return answers
"""
CONFIG = """
backend: "python" max_batch_size: 1
input [{ name: "X" data_type: TYPE_FP32 dims: [1] }] output [{ name: "Y" data_type: TYPE_INT32 dims: [1] }]
serving { supervision { unload_timeout_s: 1.0 } }
"""
HANG = -1.0
FLAGS = ["--model-control-mode=explicit", "--load-model=*", "--exit-timeout-secs=3"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    for name in ("m", "other"):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / "model.py").write_text(MODEL)
        (tmp_path / name / "config.pbtxt").write_text(CONFIG)
    with ServerProcess([tmp_path], FLAGS) as started:
        yield started


class Asking(threading.Thread):
    """One request of its own; `answer` is its value or its error."""

    def __init__(self, server: ServerProcess, value: float, model: str = "m") -> None:
        super().__init__(daemon=True)
        self.server, self.value, self.model = server, value, model
        self.answer: int | str = "nothing"
        self.start()

    def run(self) -> None:
        with http.InferenceServerClient(self.server.http, network_timeout=60) as client:
            given = http.InferInput("X", [1, 1], "FP32")
            given.set_data_from_numpy(np.full((1, 1), self.value, np.float32))
            try:
                self.answer = int(client.infer(self.model, [given]).as_numpy("Y")[0, 0])
            except InferenceServerException as error:
                self.answer = str(error.message())


def ask(server: ServerProcess, value: float, model: str = "m") -> int | str:
    asking = Asking(server, value, model)
    asking.join(30)
    return asking.answer


def until_busy(pid: int) -> None:
    """The model is in its sleep: it has begun with the request."""
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{pid}/syscall").read_text().split()[0] not in ("230", "35"):  # clock_nanosleep, nanosleep
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def state(client: http.InferenceServerClient, name: str) -> tuple[str, str]:
    [entry] = [each for each in client.get_model_repository_index() if each["name"] == name]
    return entry["state"], entry.get("reason", "")


def wait_unloaded(client: http.InferenceServerClient, name: str) -> float:
    started_s = time.monotonic()
    while state(client, name)[0] == "UNLOADING":
        assert time.monotonic() < started_s + 30, "still UNLOADING"
        time.sleep(0.02)
    return time.monotonic() - started_s


def test_a_hung_model_is_ended_with_its_process_and_can_be_loaded_again(server: ServerProcess) -> None:
    pid = ask(server, 0)
    assert isinstance(pid, int)
    with http.InferenceServerClient(server.http) as client:
        hanging = Asking(server, HANG)
        until_busy(pid)
        assert client.is_model_ready("m")  # it has not crashed, and nobody said how long it may take
        client.unload_model("m")
        assert state(client, "m")[0] == "UNLOADING"
        assert wait_unloaded(client, "m") < 10
        hanging.join(10)
        assert isinstance(hanging.answer, str)
        assert "was unloaded and answered nothing for 1 s" in hanging.answer
        assert state(client, "m") == ("UNAVAILABLE", "unloaded")
        assert not psutil.pid_exists(pid)
        client.load_model("m")
        assert isinstance(ask(server, 0), int)
        assert isinstance(ask(server, 0, "other"), int)


def test_a_model_that_goes_on_answering_is_waited_for(server: ServerProcess) -> None:
    asked = [Asking(server, 6.0) for _ in range(5)]  # 3 s in all, 0.6 s each
    with http.InferenceServerClient(server.http) as client:
        pid = ask(server, 0, "other")
        assert isinstance(pid, int)
        time.sleep(0.3)
        client.unload_model("m")
        wait_unloaded(client, "m")
        for each in asked:
            each.join(10)
        assert {type(each.answer) for each in asked} == {int}, [each.answer for each in asked]


def test_a_hung_model_that_is_loaded_anew_is_replaced_at_once_and_then_ended(server: ServerProcess) -> None:
    pid = ask(server, 0)
    assert isinstance(pid, int)
    hanging = Asking(server, HANG)
    until_busy(pid)
    with http.InferenceServerClient(server.http) as client:
        client.load_model("m", config='{"name": "m", "parameters": {"a": {"string_value": "b"}}, ' + CONFIG_JSON)
        again = ask(server, 0)
        assert isinstance(again, int)
        assert again != pid
        hanging.join(10)
        assert "was unloaded and answered nothing" in str(hanging.answer)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)
        assert not psutil.pid_exists(pid)


def test_taking_a_hung_instance_away_ends_it(server: ServerProcess) -> None:
    with http.InferenceServerClient(server.http) as client:
        two = '{"name": "m", "instance_group": [{"count": 2, "kind": "KIND_CPU"}], ' + CONFIG_JSON
        client.load_model("m", config=two)
        pid = ask(server, 0)
        assert isinstance(pid, int)
        hanging = [Asking(server, HANG) for _ in range(2)]
        until_busy(pid)
        started_s = time.monotonic()
        client.load_model("m", config=two.replace('"count": 2', '"count": 1'))
        assert time.monotonic() - started_s < 10
        for each in hanging:
            each.join(0.5)
        ended = [each for each in hanging if not each.is_alive()]
        assert len(ended) == 1
        assert "was to go and answered nothing" in str(ended[0].answer)


def write_endless(root: Path) -> None:
    """ONNX Runtime in a thread of the server: N steps of a loop, which may be as good as endless."""
    shape = [1000]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Sin", ["value"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, shape),
        ],
        [
            helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, shape),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["N", "", "start"], ["Y"], body=body)],
        "g",
        [helper.make_tensor_value_info("N", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, shape)],
        [helper.make_tensor("start", TensorProto.FLOAT, shape, [0.0] * 1000)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (root / "endless" / "1").mkdir(parents=True)
    onnx.save(model, str(root / "endless" / "1" / "model.onnx"))
    (root / "endless" / "config.pbtxt").write_text(
        'backend: "onnxruntime" input [{ name: "N" data_type: TYPE_INT64 dims: [1] }]'
        'output [{ name: "Y" data_type: TYPE_FP32 dims: [1000] }]'
        "serving { supervision { unload_timeout_s: 0.5 } }"
    )


def test_a_thread_that_hangs_is_said_so_and_does_not_spoil_the_servers_exit(tmp_path: Path) -> None:
    write_endless(tmp_path)

    def ask_for(address: str, num_steps: int, said: list[str]) -> None:
        with http.InferenceServerClient(address, network_timeout=60) as client:
            given = http.InferInput("N", [1], "INT64")
            given.set_data_from_numpy(np.array([num_steps], np.int64))
            try:
                client.infer("endless", [given])
            except InferenceServerException as error:
                said.append(str(error.message()))

    with ServerProcess([tmp_path], FLAGS) as server, http.InferenceServerClient(server.http) as client:
        ask_for(server.http, 1, [])
        said: list[str] = []
        hanging = threading.Thread(target=ask_for, args=(server.http, 10**9, said), daemon=True)
        hanging.start()
        while psutil.Process(server.pid).cpu_percent(0.2) < 50:
            continue
        client.unload_model("endless")
        wait_unloaded(client, "endless")
        hanging.join(10)
        assert said == ["instance 'endless_0' was unloaded and answered nothing for 0.5 s"]
        word, reason = state(client, "endless")
        assert word == "UNAVAILABLE"
        assert reason.startswith("unloaded; instance 'endless_0' still runs in the server's process")
        assert client.is_server_ready()
        client.load_model("endless")
        ask_for(server.http, 1, said)
        assert len(said) == 1
        assert server.stop() == 1  # it could not end everything, and says so


CONFIG_JSON = (
    '"backend": "python", "max_batch_size": 1, "input": [{"name": "X", "data_type": "TYPE_FP32", "dims": [1]}],'
    '"output": [{"name": "Y", "data_type": "TYPE_INT32", "dims": [1]}],'
    '"serving": {"supervision": {"unload_timeout_s": 1.0}}}'
)
