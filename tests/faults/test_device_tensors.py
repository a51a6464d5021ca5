"""Tensors that stay in a device's process between models there: not copied, and gone when nobody needs them."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import torch
import tritonclient.grpc as grpc
import tritonclient.http as http
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from enginehouse.errors import EnginehouseError
from enginehouse.execution.contract import Batch
from enginehouse.execution.held import HeldData
from enginehouse.execution.process_instances import ProcessInstance
from enginehouse.testing.server import ServerProcess
from enginehouse.types import InferRequest, InferResponse, Tensor
from tests.faults.hosting import Hosted
from tests.faults.test_shared_processes import machine, on

WIDTH = 4096
CONFIG = """
backend: "{backend}" max_batch_size: 8 dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}
input [{{ name: "{source}" data_type: TYPE_FP32 dims: [-1] }}]
output [{{ name: "{target}" data_type: TYPE_FP32 dims: [-1] }}]
{groups}
serving {{ host: {host} supervision {{ max_restarts: 100 backoff_initial_s: 0.01 unload_timeout_s: 2 }} }}
"""
ENSEMBLE = """
platform: "ensemble" max_batch_size: 8
input [{ name: "IN" data_type: TYPE_FP32 dims: [-1] }] output [{ name: "OUT" data_type: TYPE_FP32 dims: [-1] }]
ensemble_scheduling {
  step [
    { model_name: "doubled" model_version: -1 input_map { key: "INPUT__0" value: "IN" }
      output_map { key: "OUTPUT__0" value: "twice" } },
    { model_name: "increased" model_version: -1 input_map { key: "X" value: "twice" }
      output_map { key: "Y" value: "more" } },
    { model_name: "LAST" model_version: -1 input_map { key: "X" value: "more" }
      output_map { key: "Y" value: "OUT" } }
  ]
}
"""


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def write(root: Path, name: str, text: str) -> Path:
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(text)
    return root / name / "1"


def config_of(backend: str, source: str, target: str, host: str) -> str:
    """On a GPU where the tests are told of one, else in the device process of the CPU."""
    on_gpu = "ENGINEHOUSE_TEST_DEVICE" in os.environ and host == "HOST_DEVICE"
    groups = "instance_group { kind: KIND_GPU gpus: [0] }" if on_gpu else "instance_group { kind: KIND_CPU }"
    return CONFIG.format(backend=backend, source=source, target=target, host=host, groups=groups, delay_us=1000)


def write_doubled(root: Path, name: str, host: str = "HOST_DEVICE") -> None:
    text = config_of("pytorch", "INPUT__0", "OUTPUT__0", host)
    torch.jit.script(Doubled()).save(str(write(root, name, text) / "model.pt"))  # type: ignore[no-untyped-call]


def write_increased(root: Path, name: str, host: str = "HOST_DEVICE") -> None:
    text = config_of("onnxruntime", "X", "Y", host)
    shape: list[str | int | None] = ["N", "W"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["X", "one"], ["Y"])],
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, shape)],
        [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(write(root, name, text) / "model.onnx"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    write_doubled(tmp_path, "doubled")
    write_increased(tmp_path, "increased")
    write_increased(tmp_path, "elsewhere", "HOST_THREAD")
    write_increased(tmp_path, "last")
    for name in ("last", "elsewhere"):
        write(tmp_path, f"to_{name}", ENSEMBLE.replace("LAST", name))
    with ServerProcess([tmp_path], ["--model-control-mode=explicit", "--load-model=*"]) as started:
        yield started


def reading(server: ServerProcess, name: str) -> float:
    with urllib.request.urlopen(server.metrics_url) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def ask(client: grpc.InferenceServerClient, model: str, value: float, rows: int = 1, width: int = WIDTH) -> float:
    given = grpc.InferInput("IN", [rows, width], "FP32")
    given.set_data_from_numpy(np.full((rows, width), value, np.float32))
    result = client.infer(model, [given]).as_numpy("OUT")
    assert result.shape == (rows, width)
    assert (result == result[0, 0]).all()
    return float(result[0, 0])


def until_nothing_is_held(server: ServerProcess) -> None:
    deadline_s = time.monotonic() + 5
    while reading(server, "enginehouse_tensors_held_bytes"):
        assert time.monotonic() < deadline_s, "tensors are still held"
        time.sleep(0.02)


def test_steps_of_one_process_hand_tensors_on_and_others_get_copies(server: ServerProcess) -> None:
    with grpc.InferenceServerClient(server.grpc) as client:
        assert ask(client, "to_last", 3.0) == 8.0
        assert reading(server, "enginehouse_tensors_kept_total") == 2
        assert ask(client, "to_elsewhere", 3.0) == 8.0  # its last step lives in the server
        assert reading(server, "enginehouse_tensors_kept_total") == 3
        assert reading(server, "enginehouse_tensors_fetched_total") == 0
    until_nothing_is_held(server)


def test_many_requests_at_once_get_their_own_rows_and_leave_nothing(server: ServerProcess) -> None:
    wrong: list[str] = []

    def work(number: int) -> None:
        with grpc.InferenceServerClient(server.grpc) as client:
            for turn in range(20):
                value = float(number * 100 + turn)
                found = ask(client, "to_last", value, rows=1 + turn % 3)
                if found != 2 * value + 2:
                    wrong.append(f"{value}: {found}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert reading(server, "enginehouse_tensors_kept_total") >= 40
    until_nothing_is_held(server)


def test_cancelled_requests_and_failed_steps_leave_nothing(server: ServerProcess) -> None:
    with grpc.InferenceServerClient(server.grpc) as client:
        for _ in range(20):
            given = grpc.InferInput("IN", [8, 1 << 20], "FP32")
            given.set_data_from_numpy(np.ones((8, 1 << 20), np.float32))
            call = client.async_infer("to_last", [given], callback=lambda result, error: None)
            call.cancel()
        with pytest.raises(InferenceServerException):
            client.infer("to_last", [given], client_timeout=0.02)
    until_nothing_is_held(server)


def test_a_crash_fails_the_requests_and_the_next_ones_are_answered(server: ServerProcess) -> None:
    [pid] = {
        child.pid
        for child in psutil.Process(server.pid).children()
        if any("libtorch" in entry.path for entry in child.memory_maps())
    }
    stop, answers, errors = threading.Event(), [0], list[str]()

    def work() -> None:
        with grpc.InferenceServerClient(server.grpc) as client:
            while not stop.is_set():
                try:
                    assert ask(client, "to_last", 1.0) == 4.0
                    answers[0] += 1
                except InferenceServerException as error:
                    errors.append(str(error.message()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    psutil.Process(pid).kill()
    with http.InferenceServerClient(server.http) as client:
        deadline_s = time.monotonic() + 30
        while not errors or not all(client.is_model_ready(name) for name in ("doubled", "increased", "last")):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    before = answers[0]
    while answers[0] < before + 20:
        assert time.monotonic() < deadline_s + 30
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    allowed = ("killed by signal 9", "is restarting", "is not running", "can't be had", "is not ready")
    assert all(any(text in error for text in allowed) for error in errors), set(errors)
    until_nothing_is_held(server)


# --- two simulated devices


async def run(host: Hosted, tensor: Tensor, kept: Sequence[str] = ()) -> Tensor:
    request = InferRequest("m", inputs={"X": tensor}, batch_size=1, kept_outputs=frozenset(kept))
    answers: list[InferResponse] = []
    done = asyncio.Event()
    host.model.instances[0].execute(
        Batch([request], lambda _, response: answers.append(response), lambda *_: done.set())
    )
    await asyncio.wait_for(done.wait(), 30)
    await asyncio.sleep(0)
    if answers[-1].error is not None:
        raise answers[-1].error
    return next(output for output in answers[-1].outputs if output.name == "Y")


def held_by(host: Hosted) -> int:
    instance = host.model.instances[0]
    assert isinstance(instance, ProcessInstance)
    assert instance.worker is not None
    return instance.worker.held.num_held


@pytest.mark.asyncio
async def test_a_tensor_is_read_where_it_is_and_copied_to_another_device() -> None:
    async with machine() as gpus:
        first, second, third = await gpus.load("a", on(0)), await gpus.load("b", on(0)), await gpus.load("c", on(1))
        given = Tensor.from_numpy("X", np.full((1, 2), 5, np.int32))
        kept = await run(first, given, ["Y"])
        assert isinstance(kept.data, HeldData)
        assert held_by(first) == 1
        as_input = Tensor("X", kept.datatype, kept.shape, kept.data)
        assert (await run(second, as_input)).numpy().tolist() == [[20, 20]]
        assert kept.data.owner.num_fetched == 0
        assert (await run(third, as_input)).numpy().tolist() == [[20, 20]]
        assert kept.data.owner.num_fetched == 1
        del kept, as_input
        gc.collect()
        await first.until(lambda: held_by(first) == 0)


@pytest.mark.asyncio
async def test_a_tensor_of_a_process_that_has_ended_is_an_error_that_says_so() -> None:
    async with machine() as gpus:
        first = await gpus.load("a", on(0))
        kept = await run(first, Tensor.from_numpy("X", np.full((1, 2), 5, np.int32)), ["Y"])
        psutil.Process(await first.pid()).kill()
        await first.until(lambda: not first.model.instances[0].available)
        await first.until_ready()
        with pytest.raises(EnginehouseError, match=r"a tensor of an earlier step can't be had: .* is not running"):
            await run(first, Tensor("X", kept.datatype, kept.shape, kept.data))
