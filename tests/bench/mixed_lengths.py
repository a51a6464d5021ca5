"""`python -m tests.bench.mixed_lengths`: sentences of mixed lengths, with padding by the server and without.

MiniLM with mean pooling, one thread, lengths uniform from 8 to 256 tokens, a closed loop of clients. Compared
in one run: padding on (the default for text encoders), padding off, a real Triton with every request padded to
256 by its client and one with each at its own length, all beside the bound: every request in a batch of
its own length and of the best size, in a bare ONNX Runtime loop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnx
import uvloop
from onnx import TensorProto, helper

from tests.bench import triton_peer
from tests.bench.__main__ import our_server
from tests.bench.load_http import HttpConnection
from tests.bench.load_result import LoadResult, Tally
from tests.bench.server_process import Ports, ServerProcess
from tests.bench.workloads import ROOT, session

SHORTEST, LONGEST = 8, 256
NUM_REQUESTS = 400
MAX_BATCH_SIZE = 16
MEASURED_LENGTHS = (8, 32, 64, 128, 192, 256)
MEASURED_BATCHES = (1, 4, 16)
WARM_UP_S = 1.5


# --- the model


def pooled_minilm(path: Path) -> None:
    """MiniLM with the mean over its real tokens as its output: [batch, 384]."""
    model = onnx.load(ROOT / "model_repository" / "minilm" / "1" / "model.onnx")
    graph = model.graph
    hidden = graph.output[0].name
    version = next(each.version for each in model.opset_import if not each.domain)
    axes = helper.make_tensor("pool_axes", TensorProto.INT64, [1], [1])
    last = helper.make_tensor("pool_last", TensorProto.INT64, [1], [2])
    assert version >= 13, "axes as inputs"
    graph.initializer.extend([axes, last])
    graph.node.extend(
        [
            helper.make_node("Cast", ["attention_mask"], ["pool_mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["pool_mask", "pool_last"], ["pool_column"]),
            helper.make_node("Mul", [hidden, "pool_column"], ["pool_real"]),
            helper.make_node("ReduceSum", ["pool_real", "pool_axes"], ["pool_sum"], keepdims=0),
            helper.make_node("ReduceSum", ["pool_column", "pool_axes"], ["pool_count"], keepdims=0),
            helper.make_node("Div", ["pool_sum", "pool_count"], ["pooled"]),
        ]
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", 384]))
    onnx.save(model, path)


def config(name: str, backend: str, more: str = "") -> str:
    return f"""name: "{name}" backend: "{backend}" max_batch_size: {MAX_BATCH_SIZE}
input [ {{ name: "input_ids" data_type: TYPE_INT64 dims: [-1] }},
        {{ name: "attention_mask" data_type: TYPE_INT64 dims: [-1] }} ]
output [ {{ name: "pooled" data_type: TYPE_FP32 dims: [384] }} ]
dynamic_batching {{ }} instance_group [ {{ count: 1 kind: KIND_CPU }} ]
{more}"""


_TRITON_MODEL = '''"""Runs the batch in ONNX Runtime with the settings of the other server."""
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession({path!r}, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        feed = {{
            name: np.concatenate([pb_utils.get_input_tensor_by_name(one, name).as_numpy() for one in requests])
            for name in ("input_ids", "attention_mask")
        }}
        rows = self.session.run(["pooled"], feed)[0]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("pooled", rows[i : i + 1])]) for i in range(len(requests))
        ]
'''


def make_repositories(folder: Path) -> tuple[Path, Path, Path]:
    """(the ONNX file, our repository, Triton's)."""
    folder.mkdir(parents=True, exist_ok=True)
    artifact, ours, tritons = folder / "minilm_pooled.onnx", folder / "ours", folder / "triton"
    if not artifact.exists():
        pooled_minilm(artifact)
    for repository in (ours, tritons):
        shutil.rmtree(repository, ignore_errors=True)
    one_thread = 'parameters { key: "intra_op_thread_count" value { string_value: "1" } }'
    off = "serving { no_derived_padding: true }"
    for name, more in (("padded", one_thread), ("plain", f"{one_thread} {off}")):
        (ours / name / "1").mkdir(parents=True)
        (ours / name / "1" / "model.onnx").symlink_to(artifact)
        (ours / name / "config.pbtxt").write_text(config(name, "onnxruntime", more))
    (tritons / "plain" / "1").mkdir(parents=True)
    (tritons / "plain" / "1" / "model.py").write_text(_TRITON_MODEL.format(path=str(artifact)))
    (tritons / "plain" / "config.pbtxt").write_text(config("plain", "python"))
    return artifact, ours, tritons


# --- the bound


def bound_requests_per_second(artifact: Path, lengths: list[int], seconds: float) -> float:
    """If each request ran in a batch of its own length and of the best size, and nothing else cost anything."""
    runner = session(artifact)
    share_s = seconds / len(MEASURED_LENGTHS) / len(MEASURED_BATCHES)
    per_row_s = [
        min(_best_seconds(runner, size, length, share_s) / size for size in MEASURED_BATCHES)
        for length in MEASURED_LENGTHS
    ]
    return float(1 / np.mean(np.interp(lengths, MEASURED_LENGTHS, per_row_s)))


def _best_seconds(runner: Any, batch_size: int, length: int, seconds: float) -> float:
    ids = np.full((batch_size, length), 1000)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    runner.run(None, feed)
    best_s, end_s = float("inf"), time.perf_counter() + seconds
    while True:
        start_s = time.perf_counter()
        runner.run(None, feed)
        now_s = time.perf_counter()
        best_s = min(best_s, now_s - start_s)
        if now_s > end_s:
            return best_s


# --- the load


def request_bodies(lengths: list[int], padded_to: int) -> list[tuple[bytes, int]]:
    """(body, length of its JSON part) of each request; `padded_to` 0 sends each at its own length."""
    bodies = []
    for number, length in enumerate(lengths):
        size = padded_to or length
        ids = np.zeros((1, size), np.int64)
        ids[0, :length] = 1000 + (np.arange(length) * 37 + number) % 20000
        mask = (np.arange(size) < length).astype(np.int64)[None, :]
        header = {
            "inputs": [
                {"name": name, "shape": [1, size], "datatype": "INT64", "parameters": {"binary_data_size": 8 * size}}
                for name in ("input_ids", "attention_mask")
            ],
            "parameters": {"binary_data_output": True},
        }
        text = json.dumps(header).encode()
        bodies.append((text + ids.tobytes() + mask.tobytes(), len(text)))
    return bodies


class MixedConnection(HttpConnection):
    """Sends the requests of a list in turn, from a place of its own on."""

    def __init__(self, requests: list[bytes], tally: Tally, position: int) -> None:
        super().__init__(b"", tally)
        self._requests = requests
        self._position = position

    def _send(self) -> None:
        self._request = self._requests[self._position % len(self._requests)]
        self._position += 1
        super()._send()


async def run_load(job: dict[str, Any]) -> LoadResult:
    parts = urlsplit(job["url"])
    requests = []
    for body, json_bytes in request_bodies(job["lengths"], job["padded_to"]):
        head = (
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {len(body)}\r\n"
            f"Inference-Header-Content-Length: {json_bytes}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    tally = Tally()
    loop = asyncio.get_running_loop()
    rng = random.Random(3)
    for _ in range(job["concurrency"]):
        start = rng.randrange(len(requests))
        make = partial(MixedConnection, requests, tally, start)
        await loop.create_connection(make, parts.hostname, parts.port)
    await asyncio.sleep(WARM_UP_S)
    tally.start()
    await asyncio.sleep(job["seconds"])
    return tally.end()


def measure(
    server: ServerProcess, model: str, lengths: list[int], padded_to: int, concurrency: int, seconds: float
) -> LoadResult:
    job = {
        "url": f"http://127.0.0.1:{server.ports.http}/v2/models/{model}/infer",
        "lengths": lengths,
        "padded_to": padded_to,
        "concurrency": concurrency,
        "seconds": seconds,
    }
    command = [sys.executable, "-m", "tests.bench.mixed_lengths", "--load"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, cwd=ROOT, check=True)
    result = LoadResult(**json.loads(done.stdout))
    if result.num_bad or result.num_lost:
        raise SystemExit(f"{server.name} {model}: {result}")
    return result


def check_answers(server: ServerProcess, artifact: Path, models: list[str]) -> None:
    """Ends the program unless requests of several lengths at once get what the bare model says."""
    import tritonclient.http as client

    runner = session(artifact)
    with contextlib.closing(client.InferenceServerClient(f"127.0.0.1:{server.ports.http}", concurrency=12)) as asking:
        for model in models:
            sent = []
            for length in (8, 11, 40, 43, 90, 200, 10, 42, 95, 8, 250, 41):
                ids = (1000 + np.arange(length) * 7 % 20000).astype(np.int64)[None, :]
                feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
                inputs = [
                    client.InferInput(name, list(array.shape), "INT64").set_data_from_numpy(array)
                    for name, array in feed.items()
                ]
                sent.append((asking.async_infer(model, inputs), runner.run(None, feed)[0]))
            for pending, expected in sent:
                if not np.allclose(pending.get_result().as_numpy("pooled"), expected, atol=2e-4):
                    raise SystemExit(f"{server.name} answers {model} wrongly")


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the comparison."""

    title: str
    server: ServerProcess
    model: str
    padded_to: int = 0


def make_cases(folder: Path, ours: Path, tritons: Path, port: int, with_peer: bool) -> list[Case]:
    server = our_server(ours, Ports(port, port + 1, port + 2), folder / "enginehouse.log")
    cases = [Case("padding on", server, "padded"), Case("padding off", server, "plain")]
    if with_peer and triton_peer.is_installed():
        peer = triton_peer.process(tritons, Ports(port + 3, port + 4, port + 5), folder / "triton.log")
        cases.append(Case("Triton, client pads to 256", peer, "plain", LONGEST))
        cases.append(Case("Triton, own lengths", peer, "plain"))
    return cases


def compare(
    cases: list[Case], artifact: Path, lengths: list[int], concurrency: int, rounds: int, seconds: float
) -> None:
    """Everything is measured in turn, several times: what disturbs the machine disturbs all. Medians are shown."""
    bounds: list[float] = []
    results: dict[str, list[LoadResult]] = {case.title: [] for case in cases}
    for _ in range(rounds):
        bounds.append(bound_requests_per_second(artifact, lengths, seconds))
        for case in cases:
            got = measure(case.server, case.model, lengths, case.padded_to, concurrency, seconds)
            results[case.title].append(got)
    bound = statistics.median(bounds)
    print(f"{concurrency} at once; bound from the tokens alone: {bound:.1f} requests/s", flush=True)
    for title, measured in results.items():
        rate = statistics.median(one.requests_per_second for one in measured)
        share = statistics.median(one.requests_per_second / limit for one, limit in zip(measured, bounds, strict=True))
        p50_ms, p99_ms = (
            statistics.median(values) for values in zip(*((m.p50_ms, m.p99_ms) for m in measured), strict=True)
        )
        print(
            f"  {title:<27} {rate:>6.1f}/s  {share:>4.0%} of the bound  p50 {p50_ms:>6.0f} ms  p99 {p99_ms:>6.0f} ms",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.mixed_lengths", description=__doc__)
    parser.add_argument("--concurrency", default="16,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--port", type=int, default=18380)
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--load", action="store_true", help="be the load client: a job on stdin")
    args = parser.parse_args()
    if args.load:
        print(json.dumps(asdict(uvloop.run(run_load(json.load(sys.stdin))))))
        return
    folder = ROOT / "build" / "bench" / "mixed_lengths"
    artifact, ours, tritons = make_repositories(folder)
    rng = random.Random(7)
    lengths = [rng.randint(SHORTEST, LONGEST) for _ in range(NUM_REQUESTS)]
    cases = make_cases(folder, ours, tritons, args.port, args.peer)
    with contextlib.ExitStack() as stack:
        for server in {case.server.name: case.server for case in cases}.values():
            stack.enter_context(server)
        check_answers(cases[0].server, artifact, ["padded", "plain"])
        for concurrency in map(int, args.concurrency.split(",")):
            compare(cases, artifact, lengths, concurrency, args.rounds, args.seconds)


if __name__ == "__main__":
    main()
