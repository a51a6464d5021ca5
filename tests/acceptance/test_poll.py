"""Control mode poll: what is dropped into the repository serves, whole and without a lost request."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.http as http
from onnx import TensorProto, helper

from enginehouse.testing.server import ServerProcess

SETTLE_MS = 200


def write_adder(path: Path, added: float) -> None:
    """An ONNX file that adds a constant to its input."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"])],
        "adder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor("c", TensorProto.FLOAT, [1], [added])],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))


def ask(client: http.InferenceServerClient, name: str = "adder") -> float:
    tensor = http.InferInput("x", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 1), np.float32))
    return float(client.infer(name, [tensor]).as_numpy("y")[0, 0])


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    write_adder(root / "adder" / "1" / "model.onnx", 1.0)
    return root


def polling(repository: Path) -> ServerProcess:
    return ServerProcess(
        [repository], ["--model-control-mode=poll", f"--repository-settle-ms={SETTLE_MS}", "--exit-on-error=false"]
    )


def test_a_new_version_replaces_the_old_without_a_lost_request(repository: Path, tmp_path: Path) -> None:
    write_adder(tmp_path / "staged" / "model.onnx", 2.0)
    answers: list[float] = []
    stop = threading.Event()
    with polling(repository) as server:

        def keep_asking() -> None:
            client = http.InferenceServerClient(server.http)
            while not stop.is_set():
                answers.append(ask(client))

        askers = [threading.Thread(target=keep_asking) for _ in range(3)]
        for asker in askers:
            asker.start()
        wait_for(lambda: len(answers) > 20, "the first answers")
        shutil.copytree(tmp_path / "staged", repository / "adder" / "2")
        wait_for(lambda: bool(answers) and answers[-1] == 2.0, "the new version")
        stop.set()
        for asker in askers:
            asker.join()
    assert set(answers) == {1.0, 2.0}


def test_a_model_that_is_still_being_copied_is_not_loaded(repository: Path, tmp_path: Path) -> None:
    write_adder(tmp_path / "staged.onnx", 5.0)
    content = (tmp_path / "staged.onnx").read_bytes()
    with polling(repository) as server:
        client = http.InferenceServerClient(server.http)
        target = repository / "slow" / "1" / "model.onnx"
        target.parent.mkdir(parents=True)
        with target.open("wb") as file:
            for start in range(0, len(content), 16):
                file.write(content[start : start + 16])
                file.flush()
                time.sleep(SETTLE_MS / 1000 / 4)
        wait_for(lambda: bool(client.is_model_ready("slow")), "the copied model")
        assert ask(client, "slow") == 5.0
        assert "failed to load 'slow'" not in server.log


def test_a_removed_model_goes_and_a_broken_one_says_why(repository: Path) -> None:
    with polling(repository) as server:
        client = http.InferenceServerClient(server.http)
        broken = repository / "broken" / "1" / "model.onnx"
        broken.parent.mkdir(parents=True)
        broken.write_bytes(b"this is no ONNX file")

        def reason() -> str:
            lines = {line["name"]: line for line in client.get_model_repository_index()}
            return str(lines.get("broken", {}).get("reason", ""))

        wait_for(lambda: "model.onnx" in reason(), "the reason in the index")
        assert ask(client) == 1.0
        shutil.rmtree(repository / "adder")
        wait_for(lambda: not client.is_model_ready("adder"), "the removed model to go")
