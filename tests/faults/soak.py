"""`make soak`: thousands of interleaved sequences with cancellations, deadlines and dead clients.

    python -m tests.faults.soak [--sequences 10000] [--at-once 96]

Two models add up what a sequence sends: one keeps the sum itself (direct, `model.py`), for the other the server
does (oldest, implicit state, ONNX). Every answer that arrives must be right; afterwards nothing may be in
flight, every slot must be free, and memory must be what it was after a tenth of the run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper
from tritonclient.grpc import service_pb2

from enginehouse.testing.server import ServerProcess

Call: TypeAlias = "grpc.aio.UnaryUnaryCall[Any, Any]"
INFER = "/inference.GRPCInferenceService/ModelInfer"
SLOTS = {"direct_sum": 16, "oldest_sum": 48}
IDLE_US = 300_000
MAX_GROWTH_BYTES = 48 * 2**20

_MODEL = '''
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """A running sum for each correlation id. Forgets those that never end when there are too many."""

    def initialize(self, args):
        self.sums = {}

    def execute(self, requests):
        responses = []
        for request in requests:
            values = {t.name(): t.as_numpy().reshape(-1)[0] for t in request.inputs()}
            total = np.int64(0)
            if values["READY"]:
                number = int(values["CORRID"])
                total = values["X"] + (0 if values["START"] else self.sums.pop(number, 10**9))
                if not values["END"]:
                    self.sums[number] = total
                while len(self.sums) > 5000:
                    del self.sums[next(iter(self.sums))]
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("SUM", np.array([[total]], np.int64))]))
        return responses
'''

_COMMON = """
input [ { name: "X" data_type: TYPE_INT64 dims: [ 1 ] } ]
output [ { name: "SUM" data_type: TYPE_INT64 dims: [ 1 ] } ]
"""

_DIRECT = f"""
backend: "python" max_batch_size: 8 {_COMMON}
instance_group [ {{ count: 2 kind: KIND_CPU }} ]
sequence_batching {{
  direct {{ }}
  max_sequence_idle_microseconds: {IDLE_US}
  control_input [
    {{ name: "START" control [ {{ kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "END" control [ {{ kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "READY" control [ {{ kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "CORRID" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }} ] }}
  ]
}}
"""

_OLDEST = f"""
backend: "onnxruntime" max_batch_size: 32 {_COMMON}
sequence_batching {{
  oldest {{ max_candidate_sequences: {SLOTS["oldest_sum"]} max_queue_delay_microseconds: 200 }}
  max_sequence_idle_microseconds: {IDLE_US}
  state [ {{ input_name: "SUM_IN" output_name: "SUM_OUT" data_type: TYPE_INT64 dims: [ 1 ] }} ]
}}
"""


def make_repository(folder: Path) -> None:
    for name, config in (("direct_sum", _DIRECT), ("oldest_sum", _OLDEST)):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(config)
    (folder / "direct_sum" / "1" / "model.py").write_text(_MODEL)
    tensors = {
        name: helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", 1])
        for name in ("X", "SUM_IN", "SUM", "SUM_OUT")
    }
    nodes = [helper.make_node("Add", ["X", "SUM_IN"], ["SUM"]), helper.make_node("Identity", ["SUM"], ["SUM_OUT"])]
    graph = helper.make_graph(nodes, "sum", [tensors["X"], tensors["SUM_IN"]], [tensors["SUM"], tensors["SUM_OUT"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "oldest_sum" / "1" / "model.onnx")


class WrongAnswer(Exception):
    pass


@dataclass
class Soak:
    """One run against one server."""

    server: ServerProcess
    rng: random.Random
    kinds: Counter[str] = field(default_factory=Counter)
    num_answers: int = 0
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @contextlib.asynccontextmanager
    async def _channel(self) -> AsyncIterator[grpc.aio.Channel]:
        # a pool of its own: closing it is what a dying client does
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.aio.insecure_channel(self.server.grpc, options=options)
        try:
            yield channel
        finally:
            await channel.close(None)

    async def run(self, num_sequences: int, at_once: int) -> None:
        """So many sequences, so many at the same time. Raises WrongAnswer."""
        numbers = iter(range(num_sequences))
        async with self._channel() as shared:

            async def worker() -> None:
                for _ in numbers:
                    await self._one_sequence(shared)

            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(worker())

    async def _one_sequence(self, shared: grpc.aio.Channel) -> None:
        kind = self.rng.choices(["whole", "cancelled", "deadline", "dead client", "abandoned"], [80, 6, 5, 4, 5])[0]
        self.kinds[kind] += 1
        model = self.rng.choice(list(SLOTS))
        values = [self.rng.randrange(1000) for _ in range(self.rng.randint(1, 8))]
        stops_at = self.rng.randrange(len(values))
        acts: dict[str, Callable[[Call], Awaitable[None]]] = {
            "cancelled": self._cancel,
            "deadline": self._wait,
            "abandoned": self._wait,
        }
        if kind == "whole":
            await self._send_all(shared, model, values)
        elif kind == "dead client":
            async with self._channel() as own:
                await self._send_all(own, model, values, stops_at, self._vanish)
        else:
            timeout_s = 0.002 if kind == "deadline" else None
            await self._send_all(shared, model, values, stops_at, acts[kind], timeout_s)

    async def _send_all(
        self,
        channel: grpc.aio.Channel,
        model: str,
        values: list[int],
        stops_at: int | None = None,
        act: Callable[[Call], Awaitable[None]] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Sends the sequence; at `stops_at` does `act` to the call instead of checking it, and leaves."""
        ask = channel.unary_unary(INFER, request_serializer=None, response_deserializer=None)
        number = next(self._ids)
        total = 0
        for position, value in enumerate(values):
            request = request_bytes(model, number, value, start=position == 0, end=position == len(values) - 1)
            if position == stops_at and act is not None:
                await act(ask(request, timeout=timeout_s))
                return
            total += value
            self._check(await ask(request, timeout=60), model, number, total)

    def _check(self, answer: bytes, model: str, number: int, total: int) -> None:
        message = service_pb2.ModelInferResponse.FromString(answer)
        found = int(np.frombuffer(message.raw_output_contents[0], np.int64)[0])
        if found != total:
            raise WrongAnswer(f"sequence {number} of {model}: {found} instead of {total}")
        self.num_answers += 1

    async def _cancel(self, call: Call) -> None:
        await asyncio.sleep(self.rng.random() * 0.003)
        call.cancel()

    async def _wait(self, call: Call) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call

    async def _vanish(self, call: Call) -> None:
        await asyncio.sleep(self.rng.random() * 0.002)

    # --- what must be left

    async def check_slots(self) -> None:
        """As many sequences as there are slots are served at the same time."""
        await asyncio.sleep(2 * IDLE_US / 1e6 + 0.5)
        async with self._channel() as channel:
            ask = channel.unary_unary(INFER, request_serializer=None, response_deserializer=None)
            for model, num_slots in SLOTS.items():
                numbers = [next(self._ids) for _ in range(num_slots)]
                starts = [ask(request_bytes(model, number, 1, start=True), timeout=IDLE_US / 2e6) for number in numbers]
                try:
                    for number, call in zip(numbers, starts, strict=True):
                        self._check(await call, model, number, 1)
                except grpc.aio.AioRpcError as error:
                    raise WrongAnswer(f"{model} does not have {num_slots} free slots: {error.code()}") from error
                for number in numbers:
                    self._check(await ask(request_bytes(model, number, 1, end=True), timeout=10), model, number, 2)

    def check_nothing_pending(self) -> None:
        import urllib.request

        text = urllib.request.urlopen(self.server.metrics_url).read().decode()
        lines = [line for line in text.splitlines() if line.startswith("nv_inference_pending_request_count{")]
        if not lines or any(float(line.rsplit(" ", 1)[1]) for line in lines):
            raise WrongAnswer(f"requests are left in queues: {lines}")

    def memory_bytes(self) -> int:
        """Unique to the server and its processes."""
        root = psutil.Process(self.server.pid)
        return sum(one.memory_full_info().uss for one in (root, *root.children(recursive=True)))


def request_bytes(model: str, number: int, value: int, *, start: bool = False, end: bool = False) -> bytes:
    message = service_pb2.ModelInferRequest(model_name=model)
    message.parameters["sequence_id"].int64_param = number
    message.parameters["sequence_start"].bool_param = start
    message.parameters["sequence_end"].bool_param = end
    message.inputs.add(name="X", datatype="INT64", shape=[1, 1])
    message.raw_input_contents.append(np.int64(value).tobytes())
    data: bytes = message.SerializeToString()
    return data


async def soak(num_sequences: int, at_once: int, seed: int, report: Callable[[str], None]) -> None:
    """Raises WrongAnswer if anything of what the module promises does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        make_repository(Path(folder))
        with ServerProcess([folder]) as server:
            run = Soak(server, random.Random(seed))
            start_s = time.perf_counter()
            await run.run(num_sequences // 10, at_once)
            before = run.memory_bytes()
            await run.run(num_sequences - num_sequences // 10, at_once)
            elapsed_s = time.perf_counter() - start_s
            await run.check_slots()
            run.check_nothing_pending()
            grown = run.memory_bytes() - before
            report(f"{num_sequences} sequences in {elapsed_s:.0f} s: {dict(run.kinds)}")
            report(f"{run.num_answers} answers, all right; every slot free; memory grew by {grown / 2**20:.1f} MiB")
            if grown > MAX_GROWTH_BYTES:
                raise WrongAnswer(f"memory grew by {grown / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=96)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    try:
        asyncio.run(soak(args.sequences, args.at_once, args.seed, print))
    except* WrongAnswer as problems:
        for problem in problems.exceptions:
            print(f"FAILED: {problem}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
