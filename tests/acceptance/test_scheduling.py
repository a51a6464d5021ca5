"""Batching, sequences and pipelines through a real server, asked by tritonclient."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException

from enginehouse.testing.server import ServerProcess
from tests.unit.backends import onnx_models

pytestmark = pytest.mark.timeout(180)

SLOW = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.count = 0

    def execute(self, requests):
        self.count += 1
        time.sleep(0.05)
        tensor = pb_utils.Tensor("N", np.array([[self.count]], np.int32))
        return [pb_utils.InferenceResponse([tensor]) for _ in requests]
"""

COUNTDOWN = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.left = {}

    def execute(self, requests):
        for request in requests:
            number = request.correlation_id()
            start = pb_utils.get_input_tensor_by_name(request, "START").as_numpy().item()
            if start:
                self.left[number] = pb_utils.get_input_tensor_by_name(request, "X").as_numpy().item()
            sender = request.get_response_sender()
            tensor = pb_utils.Tensor("N", np.array([self.left[number]], np.int32))
            sender.send(pb_utils.InferenceResponse([tensor]))
            self.left[number] -= 1
            if self.left[number] > 0:
                request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
            else:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None
"""

ITERATIVE = """backend: "python" max_batch_size: 0
input [ { name: "X" data_type: TYPE_INT32 dims: [ 1 ] } ] output [ { name: "N" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
model_transaction_policy { decoupled: true }
sequence_batching {
  iterative_sequence: true
  oldest { max_candidate_sequences: 4 }
  control_input [ { name: "START" control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } ] } ]
}
"""

ENCODER = """
backend: "onnxruntime" max_batch_size: 16
input [ { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] },
        { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] } ]
output [ { name: "hidden" data_type: TYPE_INT64 dims: [ -1 ] }, { name: "total" data_type: TYPE_INT64 dims: [ 1 ] } ]
dynamic_batching { max_queue_delay_microseconds: 30000 }
"""

RAGGED = """
backend: "onnxruntime" max_batch_size: 16
input [ { name: "X" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] } ]
batch_input [ { kind: BATCH_ELEMENT_COUNT target_name: "COUNT" data_type: TYPE_FP32 source_input: "X" } ]
batch_output [ { target_name: "Y" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "X" } ]
dynamic_batching { max_queue_delay_microseconds: 30000 }
"""

SLOW_INPUTS = """backend: "python" max_batch_size: 1
input [ { name: "X" data_type: TYPE_INT32 dims: [ 1 ] } ] output [ { name: "N" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""

PIPELINE = """
platform: "ensemble" max_batch_size: 1
input [ { name: "X" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "SCORE" data_type: TYPE_FP32 dims: [ 1 ] }, { name: "DETAIL" data_type: TYPE_FP32 dims: [ 1 ] } ]
ensemble_scheduling { step [
  { model_name: "double" model_version: -1
    input_map { key: "IN" value: "X" } output_map { key: "OUT" value: "SCORE" } },
  { model_name: "double" model_version: -1
    input_map { key: "IN" value: "SCORE" } output_map { key: "OUT" value: "DETAIL" }
    serving { when: "SCORE > 10 or parameters.detail == True" } }
] }
"""


PRODUCER = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for number in range(pb_utils.get_input_tensor_by_name(request, "COUNT").as_numpy().item()):
                part = np.full(1 << 18, number, np.int32)
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("PART", part)]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
PRODUCER_CONFIG = """backend: "python" max_batch_size: 0
input [ { name: "COUNT" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "PART" data_type: TYPE_INT32 dims: [ -1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
model_transaction_policy { decoupled: true } serving { supervision { hang_timeout_s: 0.5 } }
"""
CONSUMER = """
import time
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.01)
        part = pb_utils.get_input_tensor_by_name(requests[0], "PART").as_numpy()
        return [pb_utils.InferenceResponse([pb_utils.Tensor("NUMBER", part[:1])])]
"""
CONSUMER_CONFIG = """backend: "python" max_batch_size: 0
input [ { name: "PART" data_type: TYPE_INT32 dims: [ -1 ] } ]
output [ { name: "NUMBER" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
SLOW_END = """platform: "ensemble" max_batch_size: 0
input [ { name: "COUNT" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "NUMBER" data_type: TYPE_INT32 dims: [ 1 ] } ]
ensemble_scheduling { max_inflight_requests: 2 step [
  { model_name: "producer" model_version: -1
    input_map { key: "COUNT" value: "COUNT" } output_map { key: "PART" value: "part" } },
  { model_name: "consumer" model_version: -1
    input_map { key: "PART" value: "part" } output_map { key: "NUMBER" value: "NUMBER" } }
] }
"""


def write(root: Path, name: str, config: str, model: str = "") -> Path:
    """The version folder."""
    version = root / name / "1"
    version.mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(config)
    if model:
        (version / "model.py").write_text(model)
    return version


def write_models(root: Path) -> None:
    int64, real = TensorProto.INT64, TensorProto.FLOAT
    onnx_models.save(
        write(root, "encoder", ENCODER) / "model.onnx",
        [
            helper.make_node("Mul", ["input_ids", "attention_mask"], ["real"]),
            helper.make_node("CumSum", ["real", "axis"], ["hidden"]),
            helper.make_node("ReduceSum", ["real", "axes"], ["total"], keepdims=1),
        ],
        [onnx_models.value(name, int64, ["b", "n"]) for name in ("input_ids", "attention_mask")],
        [onnx_models.value("hidden", int64, ["b", "n"]), onnx_models.value("total", int64, ["b", 1])],
        numpy_helper.from_array(np.array(1), "axis"),
        numpy_helper.from_array(np.array([1]), "axes"),
    )
    onnx_models.save(
        write(root, "ragged", RAGGED) / "model.onnx",
        [
            helper.make_node("Shape", ["COUNT"], ["rows"]),
            helper.make_node("Cast", ["rows"], ["rows_real"], to=real),
            helper.make_node("Mul", ["X", "rows_real"], ["Y"]),
        ],
        [onnx_models.value("X", real, ["elements"]), onnx_models.value("COUNT", real, ["requests"])],
        [onnx_models.value("Y", real, ["elements"])],
    )
    onnx_models.save(
        write(root, "double", 'backend: "onnxruntime" max_batch_size: 4') / "model.onnx",
        [helper.make_node("Add", ["IN", "IN"], ["OUT"])],
        [onnx_models.value("IN", real, ["b", 1])],
        [onnx_models.value("OUT", real, ["b", 1])],
    )
    write(root, "pipeline", PIPELINE)
    write(root, "countdown", ITERATIVE, COUNTDOWN)
    write(root, "producer", PRODUCER_CONFIG, PRODUCER)
    write(root, "consumer", CONSUMER_CONFIG, CONSUMER)
    write(root, "slow_end", SLOW_END)
    write(root, "shared", SLOW_INPUTS + FAIR, SLOW)
    write(root, "tuned", SLOW_INPUTS.replace("max_batch_size: 1", "max_batch_size: 8") + TUNED, SLOW)
    limited = 'rate_limiter { resources [ { name: "licence" global: true count: 1 } ] }'
    for name in ("limited_a", "limited_b"):
        write(root, name, SLOW_INPUTS.replace("kind: KIND_CPU", f"kind: KIND_CPU {limited}"), SLOW)
    write(root, "rule", SLOW_INPUTS.replace("max_batch_size: 1", "max_batch_size: 8") + RULE, SLOW)
    (root / "rule" / "pairs.py").write_text(PAIRS)


FAIR = 'serving { tenants [ { name: "paying" weight: 3 }, { name: "*" weight: 1 } ] }'
TUNED = "dynamic_batching { } serving { batching { target_p99_ms: 400 write_back: true } }"
RULE = 'dynamic_batching { } serving { batching { rule: "pairs:pairs" } }'
PAIRS = """
def pairs(waiting, max_rows):
    return [0, 1] if len(waiting) > 1 else (20_000 if waiting[0].waited_us < 20_000 else [0])
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("scheduling")
    write_models(root)
    flags = ["--rate-limit=execution_count", "--model-control-mode=explicit", "--load-model=*"]
    with ServerProcess([root], flags) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Any]:
    made = http_client.InferenceServerClient(server.http, concurrency=32)
    yield made
    made.close()


def ask(client: Any, model: str, inputs: dict[str, np.ndarray[Any, Any]], **options: Any) -> Any:
    """Without waiting: `.get_result()` gives the answer."""
    names = {"int64": "INT64", "int32": "INT32", "float32": "FP32"}
    tensors = [
        http_client.InferInput(name, list(array.shape), names[array.dtype.name]).set_data_from_numpy(array)
        for name, array in inputs.items()
    ]
    return client.async_infer(model, tensors, **options)


def stats_of(client: Any, model: str) -> Any:
    return client.get_inference_statistics(model)["model_stats"][0]


def test_texts_of_different_lengths_share_padded_batches(client: Any) -> None:
    lengths = [3, 17, 4, 16, 5, 15, 3, 17]
    sent = [np.arange(1, length + 1, dtype=np.int64)[None, :] for length in lengths]
    pending = [ask(client, "encoder", {"input_ids": ids, "attention_mask": np.ones_like(ids)}) for ids in sent]
    for ids, waiting in zip(sent, pending, strict=True):
        answer = waiting.get_result()
        assert answer.as_numpy("hidden").tolist() == np.cumsum(ids, axis=1).tolist()
        assert answer.as_numpy("total").tolist() == [[ids.sum()]]
    assert stats_of(client, "encoder")["execution_count"] < len(lengths)


def test_ragged_requests_reach_the_model_flat(client: Any) -> None:
    arrays = [np.arange(length, dtype=np.float32)[None, :] for length in (3, 5, 2)]
    pending = [ask(client, "ragged", {"X": array}) for array in arrays]
    answers = [waiting.get_result().as_numpy("Y") for waiting in pending]
    assert [answer.shape for answer in answers] == [(1, 3), (1, 5), (1, 2)]
    rows = answers[1][0, 1]  # every element is multiplied with the number of requests in its batch
    assert rows >= 1
    for array, answer in zip(arrays, answers, strict=True):
        assert answer[0, 1] in (1, 2, 3)
        assert (answer == array * answer[0, 1]).all()


@pytest.mark.parametrize(("value", "parameters", "detail"), [(1, {}, None), (6, {}, 24), (1, {"detail": True}, 4)])
def test_a_step_of_a_pipeline_runs_on_its_condition(
    client: Any, value: float, parameters: dict[str, Any], detail: float | None
) -> None:
    answer = ask(client, "pipeline", {"X": np.array([[value]], np.float32)}, parameters=parameters).get_result()
    assert answer.as_numpy("SCORE").item() == 2 * value
    found = answer.as_numpy("DETAIL")
    assert (None if found is None else found.item()) == detail


def test_step_times_come_on_request_over_both_protocols(server: ServerProcess, client: Any) -> None:
    array = np.array([[9]], np.float32)
    answer = ask(client, "pipeline", {"X": array}, parameters={"step_times": True}).get_result()
    over_http = json.loads(answer.get_response()["parameters"]["step_times"])
    with grpc_client.InferenceServerClient(server.grpc) as asking:
        tensor = grpc_client.InferInput("X", [1, 1], "FP32").set_data_from_numpy(array)
        reply = asking.infer("pipeline", [tensor], parameters={"step_times": True}).get_response()
    over_grpc = json.loads(reply.parameters["step_times"].string_param)
    for times in (over_http, over_grpc):
        assert [one["model"] for one in times] == ["double", "double"]
        assert all(one["total_us"] >= one["compute_us"] > 0 for one in times)


@pytest.mark.parametrize("named_by", ["parameters", "headers"])
def test_tenants_share_by_weight(client: Any, named_by: str) -> None:
    array = np.array([[1]], np.int32)
    pending = [("other", ask(client, "shared", {"X": array}))]
    time.sleep(0.02)
    for tenant in ("other", "paying"):
        options = {"parameters": {"parameters": {"tenant": tenant}}, "headers": {"headers": {"X-Tenant": tenant}}}
        pending += [(tenant, ask(client, "shared", {"X": array}, **options[named_by])) for _ in range(9)]
    order = {tenant: [] for tenant in ("other", "paying")}  # type: dict[str, list[int]]
    for tenant, waiting in pending:
        order[tenant].append(waiting.get_result().as_numpy("N").item())
    served_early = sorted((n, tenant) for tenant, numbers in order.items() for n in numbers)[4:12]
    assert sum(tenant == "paying" for _, tenant in served_early) in (5, 6, 7)


def test_models_take_turns_at_a_resource_that_they_share(client: Any) -> None:
    array = np.array([[1]], np.int32)
    start_s = time.perf_counter()
    pending = [ask(client, model, {"X": array}) for model in ("limited_a", "limited_b") for _ in range(3)]
    for waiting in pending:
        waiting.get_result()
    assert time.perf_counter() - start_s >= 6 * 0.05


def test_a_rule_beside_the_model_makes_its_batches(client: Any) -> None:
    pending = [ask(client, "rule", {"X": np.array([[1]], np.int32)}) for _ in range(6)]
    for waiting in pending:
        waiting.get_result()
    sizes = {entry["batch_size"]: entry["compute_infer"]["count"] for entry in stats_of(client, "rule")["batch_stats"]}
    assert sizes == {2: 3}


def test_the_tuner_shows_its_choice_and_writes_it_down(server: ServerProcess, client: Any) -> None:
    def client_loop(number: int) -> None:
        with http_client.InferenceServerClient(server.http) as asking:
            for _ in range(12):
                ask(asking, "tuned", {"X": np.array([[number]], np.int32)}).get_result()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(client_loop, range(12)))
    tuning = stats_of(client, "tuned")["tuning"]
    assert 1 <= tuning["max_batch_size"] <= 8
    assert tuning["p99_ms"] > 50
    client.unload_model("tuned")
    give_up_s = time.monotonic() + 20
    written = Path(server_root(server)) / "tuned" / "configs" / "tuned.pbtxt"
    while not written.exists():
        assert time.monotonic() < give_up_s
        time.sleep(0.05)
    assert "preferred_batch_size" in written.read_text()
    assert "target_p99_ms" not in written.read_text()


def server_root(server: ServerProcess) -> str:
    return next(part for part in server._command if part.startswith("--model-repository=")).partition("=")[2]


def test_an_iterative_request_runs_until_the_model_has_enough(server: ServerProcess) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc_client.InferenceServerClient(server.grpc) as asking:
        asking.start_stream(lambda result, error: answers.put((result, error)))
        for count in (5, 3):
            tensor = grpc_client.InferInput("X", [1], "INT32").set_data_from_numpy(np.array([count], np.int32))
            asking.async_stream_infer("countdown", [tensor], request_id=str(count))
        found: dict[str, list[int]] = {"5": [], "3": []}
        for _ in range(8):
            result, error = answers.get(timeout=20)
            assert error is None
            found[result.get_response().id].append(int(result.as_numpy("N").item()))
        asking.stop_stream()
    assert found == {"5": [5, 4, 3, 2, 1], "3": [3, 2, 1]}


def test_a_slow_step_holds_back_a_fast_producer_and_memory_stays_level(server: ServerProcess) -> None:
    count = 150  # MiB of parts, and 1.5 s of the consumer: longer than the producer may hang
    before = peak_bytes(server)
    numbers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc_client.InferenceServerClient(server.grpc) as asking:
        asking.start_stream(lambda result, error: numbers.put((result, error)))
        tensor = grpc_client.InferInput("COUNT", [1], "INT32").set_data_from_numpy(np.array([count], np.int32))
        asking.async_stream_infer("slow_end", [tensor])
        found = []
        for _ in range(count):
            result, error = numbers.get(timeout=20)
            assert error is None
            found.append(int(result.as_numpy("NUMBER").item()))
        asking.stop_stream()
    assert sorted(found) == list(range(count))
    assert peak_bytes(server) - before < 40 << 20


def peak_bytes(server: ServerProcess) -> int:
    """The most that the server and its children ever held, shared memory counted in each."""
    processes = [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]
    lines = [line for pid in processes for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def test_a_condition_that_is_no_expression_fails_the_load_by_name(client: Any) -> None:
    config = {
        "platform": "ensemble",
        "max_batch_size": 1,
        "input": [{"name": "X", "data_type": "TYPE_FP32", "dims": [1]}],
        "output": [{"name": "Y", "data_type": "TYPE_FP32", "dims": [1]}],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": "double",
                    "model_version": -1,
                    "input_map": {"IN": "X"},
                    "output_map": {"OUT": "Y"},
                    "serving": {"when": "__import__('os')"},
                }
            ]
        },
    }
    with pytest.raises(InferenceServerException, match="failed to load 'pipeline'"):
        client.load_model("pipeline", config=json.dumps(config))
    assert client.is_model_ready("pipeline")
