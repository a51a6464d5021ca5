"""model.py in real processes behind a real server: threads, coroutines, BLS, python-based backends."""

from __future__ import annotations

import json
import queue
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc

from enginehouse.testing.server import ServerProcess

HEAD = """
import asyncio, json, threading, time
import numpy as np
import triton_python_backend_utils as pb_utils
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

def number(request, name="X"):
    return int(pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)[0])

def response(*values):
    return pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array(values, dtype=np.int32))])

def ask(model, value, **more):
    inputs = [pb_utils.Tensor("X", np.array([value], dtype=np.int32))]
    return pb_utils.InferenceRequest(model_name=model, requested_output_names=["Y"], inputs=inputs, **more)

def value_of(answer):
    if answer.has_error():
        raise pb_utils.TritonModelException(answer.error().message())
    return int(pb_utils.get_output_tensor_by_name(answer, "Y").as_numpy()[0])
"""
MODELS = {
    "double": """
class TritonPythonModel:
    def execute(self, requests):
        return [response(2 * number(request)) for request in requests]
""",
    # Answers from a thread, long after execute has returned; asks another model from there.
    "threads": """
class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request.get_response_sender(), number(request))).start()
    def answer(self, sender, count):
        for index in range(count):
            time.sleep(0.01)
            sender.send(response(value_of(ask("double", index).exec())))
        sender.send(flags=FINAL)
""",
    # Coroutines of several requests run beside each other.
    "coroutines": """
class TritonPythonModel:
    async def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            calls = [ask("double", number(request)), ask("slow", 300)]
            first, second = await asyncio.gather(*[call.async_exec() for call in calls])
            sender.send(response(value_of(first), value_of(second)), FINAL)
""",
    "slow": """
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            milliseconds = number(request)
            for _ in range(milliseconds // 5):
                if request.is_cancelled():
                    milliseconds = -1
                    break
                time.sleep(0.005)
            answers.append(response(milliseconds))
        return answers
""",
    # Stops listening to another decoupled model half-way.
    "choosy": """
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            seen = []
            responses = ask("threads", 1000).exec(decoupled=True)
            for answer in responses:
                seen.append(value_of(answer))
                if len(seen) == number(request):
                    responses.cancel()
                    break
            answers.append(response(*seen))
        return answers
""",
    "keeper": """
class TritonPythonModel:
    ready = True
    def is_ready(self):
        return TritonPythonModel.ready
    def execute(self, requests):
        TritonPythonModel.ready = number(requests[0]) > 0
        return [response(0) for _ in requests]
""",
    "loader": """
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            if number(request) == 0:
                pb_utils.unload_model("double")
                while pb_utils.is_model_ready("double"):
                    time.sleep(0.01)
            else:
                pb_utils.load_model("double")
            answers.append(response(int(pb_utils.is_model_ready("double"))))
        return answers
""",
    "traced": """
class TritonPythonModel:
    def execute(self, requests):
        return [response(value_of(ask("double", number(r), trace=r.trace()).exec())) for r in requests]
""",
    "counting": """
class TritonPythonModel:
    def initialize(self, args):
        family = pb_utils.MetricFamily("seen_requests", "Requests seen.", pb_utils.MetricFamily.COUNTER)
        self.metric = family.Metric(labels={"model": "counting"})
    def execute(self, requests):
        self.metric.increment(len(requests))
        pb_utils.Logger.log_warn(f"seen {int(self.metric.value())}")
        return [response(int(self.metric.value())) for _ in requests]
""",
    "iterating": """
class TritonPythonModel:
    def execute(self, requests):
        self.rounds = getattr(self, "rounds", 0) + 1
        for request in requests:
            if self.rounds < 5:
                request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
            else:
                request.get_response_sender().send(response(self.rounds), FINAL)
                self.rounds = 0
""",
}
DECOUPLED = "model_transaction_policy { decoupled: true }"
EXTRA = {
    "threads": DECOUPLED,
    "coroutines": DECOUPLED,
    "iterating": DECOUPLED + "sequence_batching { iterative_sequence: true }",
}
TENSORS = """
input [{ name: "X" data_type: TYPE_INT32 dims: [-1] }] output [{ name: "Y" data_type: TYPE_INT32 dims: [-1] }]
"""
OWN_BACKEND = """
class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "X", "data_type": "TYPE_INT32", "dims": [-1]})
        config.add_output({"name": "Y", "data_type": "TYPE_INT32", "dims": [-1]})
        return config
    def initialize(self, args):
        with open(args["model_repository"] + "/" + args["model_version"] + "/factor.txt") as file:
            self.factor = int(file.read())
    def execute(self, requests):
        return [response(self.factor * number(request)) for request in requests]
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("python")
    for name, source in MODELS.items():
        write(root / "models" / name / "1" / "model.py", HEAD + textwrap.dedent(source))
        write(root / "models" / name / "config.pbtxt", f'backend: "python" {TENSORS} {EXTRA.get(name, "")}')
    write(root / "backends" / "times" / "model.py", HEAD + OWN_BACKEND)
    for name, factor in (("by_three", 3), ("by_seven", 7)):
        write(root / "models" / name / "1" / "factor.txt", str(factor))
        write(root / "models" / name / "config.pbtxt", 'backend: "times"')
    flags = [f"--backend-directory={root / 'backends'}", "--model-control-mode=explicit", "--load-model=*"]
    flags += [f"--trace-config=triton,file={root / 'trace.json'}", "--trace-config=level=TIMESTAMPS"]
    with ServerProcess([root / "models"], flags) as running:
        yield running


def inputs(value: int) -> list[Any]:
    tensor = grpc.InferInput("X", [1], "INT32")
    tensor.set_data_from_numpy(np.array([value], np.int32))
    return [tensor]


def infer(server: ServerProcess, model: str, value: int, timeout_s: float = 10.0) -> list[int]:
    with grpc.InferenceServerClient(server.grpc) as client:
        answer = client.infer(model, inputs(value), client_timeout=timeout_s)
        found: list[int] = answer.as_numpy("Y").tolist()
        return found


def stream(server: ServerProcess, model: str, *values: int) -> list[list[int]]:
    """Every answer to these requests, sent at once on one stream."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for value in values:
            client.async_stream_infer(model, inputs(value), enable_empty_final_response=True)
        found, owed = [], len(values)
        while owed:
            result, error = answers.get(timeout=20)
            assert error is None, error
            owed -= result.get_response().parameters["triton_final_response"].bool_param
            if result.as_numpy("Y") is not None:
                found.append(result.as_numpy("Y").tolist())
        client.stop_stream()
    return found


def test_threads_outlive_execute_and_may_ask_other_models(server: ServerProcess) -> None:
    assert stream(server, "threads", 4) == [[0], [2], [4], [6]]


def test_threads_of_many_requests_answer_at_the_same_time(server: ServerProcess) -> None:
    started = time.monotonic()
    assert len(stream(server, "threads", *[20] * 10)) == 200
    assert time.monotonic() - started < 10  # one after the other they would take longer


def test_decoupled_coroutines_run_beside_each_other(server: ServerProcess) -> None:
    started = time.monotonic()
    assert sorted(stream(server, "coroutines", 1, 2)) == [[2, 300], [4, 300]]
    # `slow` has one instance, so the two waits of 0.3 s follow each other; the answers prove both were asked.
    assert time.monotonic() - started < 3


def test_listening_to_another_model_can_stop_half_way(server: ServerProcess) -> None:
    started = time.monotonic()
    assert infer(server, "choosy", 3) == [0, 2, 4]
    assert infer(server, "double", 5) == [10]
    assert time.monotonic() - started < 5


def test_a_deadline_cancels_the_running_model(server: ServerProcess) -> None:
    with pytest.raises(Exception, match="Deadline Exceeded"):
        infer(server, "slow", 5000, timeout_s=0.2)
    assert infer(server, "slow", 5, timeout_s=2.0) == [5]  # the instance is free again


def test_the_models_own_readiness_is_the_endpoints_answer(server: ServerProcess) -> None:
    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://{server.http}/v2/models/keeper/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False

    assert ready()
    infer(server, "keeper", 0)
    assert not ready()
    infer(server, "keeper", 1)
    assert ready()


def test_models_are_loaded_and_unloaded_by_a_model(server: ServerProcess) -> None:
    assert infer(server, "loader", 0) == [0]
    with pytest.raises(Exception, match="double"):
        infer(server, "double", 1)
    assert infer(server, "loader", 1) == [1]
    assert infer(server, "double", 1) == [2]


def test_metrics_and_logs_reach_the_server(server: ServerProcess) -> None:
    assert [infer(server, "counting", 0), infer(server, "counting", 0)] == [[1], [2]]
    with urllib.request.urlopen(server.metrics_url, timeout=5) as answer:
        assert 'seen_requests{model="counting"} 2' in answer.read().decode()
    assert '"seen 2"' in server.log


def test_a_models_own_request_is_traced_as_its_child(server: ServerProcess, tmp_path: Path) -> None:
    with grpc.InferenceServerClient(server.grpc) as client:
        file = Path(client.get_trace_settings(as_json=True)["settings"]["trace_file"]["value"][0])
        client.update_trace_settings(settings={"trace_rate": "1", "log_frequency": "1"})
        assert infer(server, "traced", 4) == [8]
        client.update_trace_settings(settings={"trace_rate": "1000"})
    entries = [entry for part in sorted(file.parent.glob("trace.json*")) for entry in json.loads(part.read_text())]
    by_model = {entry["model_name"]: entry for entry in entries if "model_name" in entry}
    assert by_model["double"]["parent_id"] == by_model["traced"]["id"]


def test_an_iterating_model_gets_its_request_again(server: ServerProcess) -> None:
    assert stream(server, "iterating", 1) == [[5]]
    assert stream(server, "iterating", 1) == [[5]]


def test_a_python_based_backend_serves_models_without_code(server: ServerProcess) -> None:
    assert [infer(server, "by_three", 5), infer(server, "by_seven", 5)] == [[15], [35]]
