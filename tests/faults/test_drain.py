"""SIGTERM: not ready first, then everything that was accepted is answered, then exit status 0."""

from __future__ import annotations

import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from grpc import insecure_channel as grpc_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from enginehouse.testing.server import ServerProcess

SLOW_MODEL = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.set_max_batch_size(0)
        config.add_input({"name": "SECONDS", "data_type": "TYPE_FP32", "dims": [1]})
        config.add_output({"name": "DONE", "data_type": "TYPE_FP32", "dims": [1]})
        return config

    def execute(self, requests):
        answers = []
        for request in requests:
            seconds = pb_utils.get_input_tensor_by_name(request, "SECONDS").as_numpy()
            time.sleep(float(seconds[0]))
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("DONE", seconds)]))
        return answers
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    version = tmp_path / "models" / "slow" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(SLOW_MODEL)
    (version.parent / "config.pbtxt").write_text('backend: "python"\ninstance_group [{ count: 4 kind: KIND_CPU }]\n')
    return tmp_path / "models"


def infer(client: object, package: object, seconds: float) -> float:
    tensor = package.InferInput("SECONDS", [1], "FP32")  # type: ignore[attr-defined]
    tensor.set_data_from_numpy(np.array([seconds], np.float32))
    return float(client.infer("slow", [tensor]).as_numpy("DONE")[0])  # type: ignore[attr-defined]


def test_requests_in_flight_and_in_the_queue_are_answered_and_the_exit_is_clean(repository: Path) -> None:
    answered: list[float] = []
    with ServerProcess([repository], ["--exit-timeout-secs=20"]) as server:

        def ask(package: object, address: str) -> None:
            client = package.InferenceServerClient(address)  # type: ignore[attr-defined]
            answered.append(infer(client, package, 0.5))

        # twelve requests for four instances: some run, some wait
        askers = [threading.Thread(target=ask, args=(http, server.http)) for _ in range(6)]
        askers += [threading.Thread(target=ask, args=(grpc, server.grpc)) for _ in range(6)]
        for asker in askers:
            asker.start()
        time.sleep(0.3)
        assert server.stop() == 0
        for asker in askers:
            asker.join()
        assert len(answered) == len(askers)


def test_the_server_says_not_ready_while_it_still_serves(repository: Path) -> None:
    with ServerProcess([repository], ["--drain-delay-secs=1.5"]) as server:
        client = http.InferenceServerClient(server.http)
        assert client.is_server_ready()
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + 5
        while client.is_server_ready():
            assert time.monotonic() < deadline_s, "still ready"
            time.sleep(0.01)
        assert infer(client, http, 0.0) == 0.0
        assert server.process.wait(20) == 0


SUMS = Path(__file__).parents[1] / "acceptance" / "frontends" / "models" / "running_sum"


def test_what_was_begun_goes_on_and_nothing_new_is_taken(repository: Path) -> None:
    shutil.copytree(SUMS, repository / "running_sum")
    with ServerProcess([repository]) as server:
        client = grpc.InferenceServerClient(server.grpc)

        def add(value: int, **flags: bool | int) -> int:
            tensor = grpc.InferInput("IN", [1, 1], "INT32")
            tensor.set_data_from_numpy(np.array([[value]], np.int32))
            return int(client.infer("running_sum", [tensor], **flags).as_numpy("OUT").item())

        assert add(5, sequence_id=7, sequence_start=True) == 5
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Waiting for in-flight" in server.log)
        refused = "Server is stopping, scheduler for model has stopped accepting new inference requests"
        for new in (lambda: infer(client, grpc, 0.0), lambda: add(1, sequence_id=8, sequence_start=True)):
            with pytest.raises(InferenceServerException, match=refused) as caught:
                new()
            assert caught.value.status() == "StatusCode.UNAVAILABLE"
        assert add(6, sequence_id=7, sequence_end=True) == 11
        assert server.process.wait(20) == 0
        assert "Model 'running_sum' (version 1) has 1 in-flight inferences" in server.log


def test_a_repository_that_is_not_there_ends_the_start_or_leaves_a_server_that_says_so(tmp_path: Path) -> None:
    with ServerProcess([tmp_path / "nowhere"], wait_ready=False) as server:
        assert server.process is not None
        assert server.process.wait(30) == 1
        assert f"error: creating server: Internal - failed to stat file {tmp_path / 'nowhere'}" in server.log
    with ServerProcess([tmp_path / "nowhere"], ["--exit-on-error=false"], wait_ready=False) as server:
        wait_for(lambda: "failed to stat file" in server.log)
        client = http.InferenceServerClient(server.http)
        assert not client.is_server_live()
        assert client.get_server_metadata()["name"] == "triton"
        with pytest.raises(InferenceServerException, match="Server not ready") as caught:
            client.get_model_metadata("any")
        assert caught.value.status() == "503"
        assert server.stop() == 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.01)


def test_streams_that_clients_leave_open_do_not_hold_up_the_exit(repository: Path) -> None:
    answers: queue.SimpleQueue[tuple[object, InferenceServerException | None]] = queue.SimpleQueue()
    with (
        ServerProcess([repository], ["--exit-timeout-secs=30"]) as server,
        grpc_channel(server.grpc) as channel,
        grpc.InferenceServerClient(server.grpc) as client,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        client.start_stream(lambda result, error: answers.put((result, error)))
        tensor = grpc.InferInput("SECONDS", [1], "FP32")
        tensor.set_data_from_numpy(np.array([0.0], np.float32))
        client.async_stream_infer("slow", [tensor])
        assert answers.get(timeout=20)[1] is None
        began_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began_s < 15
        _, error = answers.get(timeout=5)
        assert error is not None
        assert "Server is stopping" in str(error)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_server_without_a_repository_says_which_flag_is_missing() -> None:
    with ServerProcess([], wait_ready=False) as server:
        assert server.process is not None
        assert server.process.wait(60) == 1
        assert "error: creating server: Invalid argument - --model-repository must be specified" in server.log
