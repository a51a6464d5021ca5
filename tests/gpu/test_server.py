"""GPU models in a real server: who holds CUDA contexts, and what is left when models go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.http as http_client

from enginehouse.testing.server import ServerProcess
from tests.acceptance.conftest import EXAMPLES

ON_GPU = "\ninstance_group [ { kind: KIND_GPU gpus: [ 0 ] } ]\n"
MIB = 1 << 20


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    for model in ("minilm", "pooling", "digits"):
        shutil.copytree(EXAMPLES / model, root / model)
        config = root / model / "config.pbtxt"
        config.write_text(config.read_text() + ON_GPU)
    for model in ("tokenizer", "text_embedding"):
        shutil.copytree(EXAMPLES / model, root / model)
    return root


@pytest.fixture
def server(repository: Path) -> Iterator[ServerProcess]:
    flags = ["--model-control-mode=explicit", *(f"--load-model={path.name}" for path in repository.iterdir())]
    with ServerProcess([repository], flags) as running:
        yield running


def embedding(server: ServerProcess, *sentences: str) -> Any:
    text = http_client.InferInput("text", [len(sentences), 1], "BYTES")
    text.set_data_from_numpy(np.array([[sentence.encode()] for sentence in sentences], dtype=object))
    with http_client.InferenceServerClient(server.http, network_timeout=120.0) as client:
        return client.infer("text_embedding", [text]).as_numpy("embedding")


def bytes_by_process() -> dict[int, int]:
    """GPU memory of each process that has a CUDA context."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return {one.pid: one.usedGpuMemory or 0 for one in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}


def used_bytes() -> int:
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def test_one_device_process_holds_the_only_context_and_the_server_none(server: ServerProcess) -> None:
    assert embedding(server, "a cat", "a much longer sentence about a cat on a mat").shape == (2, 384)
    family = {server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))}
    holders = family & set(bytes_by_process())
    assert len(holders) == 1
    assert server.pid not in holders


def test_unloading_everything_gives_the_memory_back(server: ServerProcess, repository: Path) -> None:
    loaded_bytes = used_bytes()
    with http_client.InferenceServerClient(server.http) as client:
        for model in sorted(path.name for path in repository.iterdir()):
            client.unload_model(model)
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s and loaded_bytes - used_bytes() < 90 * MIB:
        time.sleep(0.1)
    assert loaded_bytes - used_bytes() > 90 * MIB, "MiniLM's weights alone are more"


def test_memory_is_level_while_one_model_comes_and_goes(server: ServerProcess) -> None:
    readings = []
    with http_client.InferenceServerClient(server.http, network_timeout=120.0) as client:
        for cycle in range(40):
            client.unload_model("minilm")
            client.load_model("minilm")
            embedding(server, "a cat")
            if cycle % 10 == 9:
                readings.append(used_bytes())
    assert max(readings) - readings[0] < 128 * MIB, readings


def test_group_for_a_gpu_that_is_not_there_is_refused_by_name(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "iris_trees", tmp_path / "iris_trees")
    (tmp_path / "iris_trees" / "config.pbtxt").write_text("instance_group [ { kind: KIND_GPU gpus: [ 99 ] } ]")
    with ServerProcess([tmp_path], ["--exit-on-error=false"], wait_ready=False) as server:
        deadline_s = time.monotonic() + 60
        reason = ""
        with http_client.InferenceServerClient(server.http) as client:
            while time.monotonic() < deadline_s and "gpu id 99" not in reason:
                time.sleep(0.2)
                try:
                    reason = "".join(entry.get("reason", "") for entry in client.get_model_repository_index())
                except OSError:
                    continue
        assert "gpu id 99" in reason
