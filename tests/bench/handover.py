"""What a step of an ensemble costs when its tensor stays in the process of both models, and when it doesn't.

    python -m tests.bench.handover [--mib 1 16] [--seconds 2]

Three ONNX models (x + 1) one after the other, on the CPU: in one device process, in a process each, and in threads of
the server. No front end. Prints the latency of an ensemble request, and the CPU time of server and workers.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import psutil
import uvloop
from onnx import TensorProto, helper

from enginehouse.app import Server
from enginehouse.observe.logs import ServerLogging, log_settings
from enginehouse.options import parse_options
from enginehouse.types import InferRequest, Tensor

NUM_STEPS = 3
CONFIG = """
backend: "onnxruntime" max_batch_size: 0
input [{{ name: "X" data_type: TYPE_FP32 dims: [-1] }}] output [{{ name: "Y" data_type: TYPE_FP32 dims: [-1] }}]
instance_group {{ kind: KIND_CPU }} parameters {{ key: "intra_op_thread_count" value {{ string_value: "1" }} }}
serving {{ host: {host} device_host: "{process}" }}
"""
PLACES: dict[str, tuple[str, Callable[[int], str]]] = {
    "one device process": ("HOST_DEVICE", lambda step: "shared"),
    "a process each": ("HOST_DEVICE", lambda step: f"apart{step}"),
    "threads of the server": ("HOST_THREAD", lambda step: ""),
}


def write_models(root: Path) -> None:
    shape: list[str | int | None] = ["N"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["X", "one"], ["Y"])],
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, shape)],
        [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for number, (host, process) in enumerate(PLACES.values()):
        steps = []
        for step in range(NUM_STEPS):
            name, source, target = f"m{number}{step}", f"t{step}", f"t{step + 1}"
            (root / name / "1").mkdir(parents=True)
            onnx.save(model, str(root / name / "1" / "model.onnx"))
            (root / name / "config.pbtxt").write_text(CONFIG.format(host=host, process=process(step)))
            steps.append(
                f'step {{ model_name: "{name}" model_version: -1 input_map {{ key: "X" value: "{source}" }} '
                f'output_map {{ key: "Y" value: "{target}" }} }}'
            )
        (root / f"e{number}" / "1").mkdir(parents=True)
        (root / f"e{number}" / "config.pbtxt").write_text(
            f'platform: "ensemble" input [{{ name: "t0" data_type: TYPE_FP32 dims: [-1] }}] '
            f'output [{{ name: "t{NUM_STEPS}" data_type: TYPE_FP32 dims: [-1] }}] '
            f"ensemble_scheduling {{ {' '.join(steps)} }}"
        )


def cpu_s() -> float:
    workers = [worker.cpu_times() for worker in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in workers)


async def measure(server: Server, place: str, number: int, mib: float, seconds: float) -> None:
    data = np.zeros(int(mib * (1 << 20)) // 4, np.float32)
    durations: list[float] = []

    async def ask() -> None:
        started = time.perf_counter()
        answer = await server.core.infer(InferRequest(f"e{number}", inputs={"t0": Tensor.from_numpy("t0", data)}))
        assert answer.outputs[0].numpy()[-1] == NUM_STEPS
        durations.append(time.perf_counter() - started)

    for _ in range(3):
        await ask()
    durations.clear()
    start_s, end_s = cpu_s(), time.monotonic() + seconds
    while time.monotonic() < end_s:
        await ask()
    cost_ms = (cpu_s() - start_s) / len(durations) * 1000
    p50_ms = statistics.median(durations) * 1000
    print(f"{mib:5g} MiB, {place:22} p50 {p50_ms:7.2f} ms, {cost_ms:7.2f} ms CPU a request")


async def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        flags = ["--allow-http=false", "--allow-grpc=false", "--allow-metrics=false"]
        options = parse_options([f"--model-repository={folder}", *flags], {})
        server = Server(options, ServerLogging(log_settings(options)))
        await server.start()
        logging.disable(logging.CRITICAL)
        for mib in arguments.mib:
            for number, place in enumerate(PLACES):
                await measure(server, place, number, mib, arguments.seconds)
        await server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=float, nargs="+", default=[0.001, 1, 16])
    parser.add_argument("--seconds", type=float, default=2.0)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    uvloop.run(main(parser.parse_args()))
