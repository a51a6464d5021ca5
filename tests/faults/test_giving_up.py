"""A model that has crashed too often: everyone is answered, its memory is given back, and a load brings it back."""

from __future__ import annotations

import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from enginehouse.testing.server import ServerProcess

MODEL = """
import ctypes, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
            if x[0, 0] < 0:
                time.sleep(0.3)
                ctypes.string_at(0)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", x)]))
        return answers
"""
CONFIG = """
backend: "python" max_batch_size: 1
input [{ name: "X" data_type: TYPE_FP32 dims: [1] }] output [{ name: "Y" data_type: TYPE_FP32 dims: [1] }]
serving { supervision { max_restarts: 1 backoff_initial_s: 0.01 } }
"""


def ask(server: ServerProcess, value: float) -> str:
    """The answer's value or its error."""
    with http.InferenceServerClient(server.http, network_timeout=20) as client:
        given = http.InferInput("X", [1, 1], "FP32")
        given.set_data_from_numpy(np.full((1, 1), value, np.float32))
        try:
            return str(client.infer("m", [given]).as_numpy("Y")[0, 0])
        except InferenceServerException as error:
            return str(error.message())


def booked_bytes(server: ServerProcess) -> float:
    with urllib.request.urlopen(server.metrics_url) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("enginehouse_memory_bytes{"))


def test_giving_up_answers_whoever_waits_and_gives_the_memory_back(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.py").write_text(MODEL)
    (tmp_path / "m" / "config.pbtxt").write_text(CONFIG)
    with (
        ServerProcess([tmp_path], ["--model-control-mode=explicit", "--load-model=m"]) as server,
        http.InferenceServerClient(server.http) as client,
    ):
        before = booked_bytes(server)
        assert "SIGSEGV" in ask(server, -1)
        while not client.is_model_ready("m"):
            time.sleep(0.02)
        answers: list[str] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(server, -1))) for _ in range(6)]
        started_s = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - started_s < 5
        assert all("SIGSEGV" in answer for answer in answers), set(answers)
        assert any("gave up after 2 crashes" in answer for answer in answers), "nobody waited in the queue"
        [entry] = client.get_model_repository_index()
        assert entry["state"] == "UNAVAILABLE"
        assert entry["reason"].startswith("gave up after 2 crashes")
        assert booked_bytes(server) == 0
        client.load_model("m")
        assert ask(server, 5) == "5.0"
        assert abs(booked_bytes(server) - before) < before / 2
        with urllib.request.urlopen(server.metrics_url) as answer:
            series = [line.rpartition(" ")[0] for line in answer.read().decode().splitlines() if line[:1] != "#"]
        assert len(series) == len(set(series))
