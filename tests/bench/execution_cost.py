"""CPU time of one request to a `model.py` in a process of its own: through core, and through the host alone.

    python tests/bench/execution_cost.py [--in-flight 16] [--seconds 2]

No front end. Prints µs of CPU a request for the server's and the worker's process, and the latency.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import uvloop

from enginehouse.app import Server
from enginehouse.execution.contract import Batch
from enginehouse.observe.logs import ServerLogging, log_settings
from enginehouse.options import parse_options
from enginehouse.types import InferRequest, InferResponse, Tensor

CONFIG = """
backend: "python" max_batch_size: {rows} {scheduling}
input [{{ name: "IN" data_type: TYPE_FP32 dims: [ -1 ] }}]
output [{{ name: "OUT" data_type: TYPE_FP32 dims: [ -1 ] }}]
"""
MODEL = '''
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            data = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", data)]))
        return responses
'''


def write_model(root: Path, arguments: argparse.Namespace) -> None:
    folder = root / "identity" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(MODEL)
    scheduling = "dynamic_batching {}" if arguments.rows else ""
    (folder.parent / "config.pbtxt").write_text(CONFIG.format(rows=arguments.rows, scheduling=scheduling))


async def measure(what: str, send: Callable[[Callable[[], None]], None], in_flight: int, seconds: float) -> None:
    """Keeps `in_flight` requests going; `send(done)` sends one."""
    loop = asyncio.get_running_loop()
    finished = loop.create_future()
    workers = psutil.Process().children()
    latencies: list[float] = []
    count = 0
    open_requests = 0
    deadline = time.monotonic() + seconds

    def one() -> None:
        nonlocal open_requests
        open_requests += 1
        started = time.perf_counter()

        def done() -> None:
            nonlocal count, open_requests
            count += 1
            open_requests -= 1
            latencies.append(time.perf_counter() - started)
            if time.monotonic() < deadline:
                one()
            elif open_requests == 0:
                finished.set_result(None)

        send(done)

    def worker_s() -> float:
        return sum(worker.cpu_times().user + worker.cpu_times().system for worker in workers)

    server_start, worker_start, start = time.process_time(), worker_s(), time.monotonic()
    for _ in range(in_flight):
        one()
    await finished
    elapsed = time.monotonic() - start
    server_us = (time.process_time() - server_start) / count * 1e6
    worker_us = (worker_s() - worker_start) / count * 1e6
    latencies.sort()
    print(
        f"{what:34} {in_flight:3} in flight: {server_us + worker_us:5.1f} µs CPU a request "
        f"(server {server_us:.1f}, worker {worker_us:.1f}), p50 {statistics.median(latencies) * 1e6:.0f} µs, "
        f"p99 {latencies[int(len(latencies) * 0.99)] * 1e6:.0f} µs, {count / elapsed:,.0f} requests/s"
    )


async def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), arguments)
        options = parse_options(
            [f"--model-repository={folder}", "--allow-http=false", "--allow-grpc=false", "--allow-metrics=false"], {}
        )
        server = Server(options, ServerLogging(log_settings(options)))
        await server.start()
        logging.disable(logging.CRITICAL)
        served = server.core.model("identity")
        [instance] = served.hosted.instances
        data = np.zeros((1, arguments.bytes // 4) if arguments.rows else arguments.bytes // 4, np.float32)

        def request(sink: Callable[[InferResponse], None] | None) -> InferRequest:
            tensor = Tensor.from_numpy("IN", data)
            return InferRequest("identity", inputs={"IN": tensor}, requested_outputs=(), sink=sink)

        def through_host(done: Callable[[], None]) -> None:
            instance.execute(
                Batch([request(None)], lambda request, response: None, lambda batch, times, error: done())
            )

        def through_core(done: Callable[[], None]) -> None:
            server.core.submit(request(lambda response: done()))

        for in_flight in arguments.in_flight:
            await measure("host (instance.execute)", through_host, in_flight, arguments.seconds)
            await measure("core.submit", through_core, in_flight, arguments.seconds)
        await server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rows", type=int, default=64, help="max_batch_size; 0 batches nothing")
    parser.add_argument("--bytes", type=int, default=64)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    uvloop.run(main(parser.parse_args()))
