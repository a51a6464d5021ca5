"""A thousand models in one repository, loaded when asked for, under a limit that holds fifty of them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.http as http_client
from onnx import TensorProto, helper, numpy_helper

from enginehouse.testing.server import ServerProcess
from tests.unit.backends import onnx_models

NUM_MODELS = 1000
NUM_RESIDENT = 50
NUM_WEIGHTS = 16384
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def write_model(root: Path, number: int) -> int:
    """OUTPUT = INPUT + the sum of its weights, which is `number`. The file's size."""
    weights = np.zeros(NUM_WEIGHTS, np.float32)
    weights[number % NUM_WEIGHTS] = number
    folder = root / f"model_{number}"
    path = onnx_models.save(
        folder / "1" / "model.onnx",
        [
            helper.make_node("ReduceSum", ["WEIGHTS"], ["SUM"], keepdims=0),
            helper.make_node("Add", ["INPUT", "SUM"], ["OUTPUT"]),
        ],
        [onnx_models.value("INPUT", TensorProto.FLOAT, ["batch", 1])],
        [onnx_models.value("OUTPUT", TensorProto.FLOAT, ["batch", 1])],
        numpy_helper.from_array(weights, "WEIGHTS"),
    )
    (folder / "config.pbtxt").write_text(
        'serving { load: LOAD_ON_DEMAND }\nparameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'
    )
    return path.stat().st_size


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Its root, and the size of the largest model."""
    root = tmp_path_factory.mktemp("thousand")
    return root, max(write_model(root, number) for number in range(NUM_MODELS))


@pytest.fixture(scope="module")
def server(repository: tuple[Path, int]) -> Iterator[ServerProcess]:
    root, num_bytes = repository
    limit_bytes = NUM_RESIDENT * num_bytes + num_bytes // 2
    with ServerProcess([root], [f"--memory-limit=cpu={limit_bytes}"], wait_ready=False) as running:
        yield running


def ask(client: http_client.InferenceServerClient, number: int, value: float = 1.0) -> float:
    tensor = http_client.InferInput("INPUT", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.full((1, 1), value, np.float32))
    return float(client.infer(f"model_{number}", [tensor]).as_numpy("OUTPUT")[0, 0])


def resident_models(client: http_client.InferenceServerClient) -> int:
    return sum(entry.get("state") == "READY" for entry in client.get_model_repository_index())


def memory_bytes(server: ServerProcess) -> int:
    process = psutil.Process(server.pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def test_thousand_models_are_listed_in_seconds_and_loaded_by_their_first_request(server: ServerProcess) -> None:
    started_s = time.monotonic()
    while not server.is_ready():
        assert time.monotonic() - started_s < 20, server.log[-2000:]
        time.sleep(0.05)
    with http_client.InferenceServerClient(server.http) as client:
        assert len(client.get_model_repository_index()) == NUM_MODELS
        assert resident_models(client) == 0
        assert ask(client, 7) == 8
        assert resident_models(client) == 1


def test_every_model_answers_for_itself_and_no_more_than_fit_are_resident(server: ServerProcess) -> None:
    with http_client.InferenceServerClient(server.http) as client:
        for number in range(NUM_MODELS):
            assert ask(client, number) == number + 1
            if number % 100 == 99:
                assert 0 < resident_models(client) <= NUM_RESIDENT


def test_memory_is_level_while_models_come_and_go(server: ServerProcess) -> None:
    chooser = random.Random(11)
    readings = []
    with http_client.InferenceServerClient(server.http) as client:
        for _ in range(5):
            for number in chooser.sample(range(NUM_MODELS), 200):
                assert ask(client, number, 2.0) == number + 2
            readings.append(memory_bytes(server))
    # a thousand loads that each left a tenth of their weights would be 6.5 MB; allocators wobble by a few MB
    assert readings[-1] - readings[0] < 16 << 20, readings


def test_requests_for_many_models_at_once_are_all_answered_right(server: ServerProcess) -> None:
    chooser = random.Random(12)
    wanted = [chooser.choice([chooser.randrange(NUM_MODELS), chooser.randrange(20)]) for _ in range(400)]

    def work(numbers: list[int]) -> list[tuple[int, float]]:
        with http_client.InferenceServerClient(server.http, network_timeout=60.0) as client:
            return [(number, ask(client, number)) for number in numbers]

    with ThreadPoolExecutor(8) as pool:
        answers = [pair for part in pool.map(work, [wanted[start::8] for start in range(8)]) for pair in part]
    assert len(answers) == len(wanted)
    assert all(answer == number + 1 for number, answer in answers)
