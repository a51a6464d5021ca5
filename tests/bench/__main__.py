"""`make bench`: requests a second and server CPU a request, beside a bare ONNX Runtime loop and a real Triton.

    python -m tests.bench [--models identity,minilm] [--protocols http,grpc] [--concurrency 1,16,64] [--seconds 3]

Servers that are compared run at the same time and are measured in turn, so that what disturbs the machine
disturbs both. How many cores others kept busy is measured too; of `--tries` the quietest one counts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from tests.bench import triton_peer
from tests.bench.load_result import LoadResult
from tests.bench.server_process import Ports, ServerProcess, machine_busy_s
from tests.bench.workloads import ROOT, WORKLOADS, Workload, make_repositories, session

WARM_UP_S = 0.7
QUIET_CORES = 0.15


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. `cpu_ms` is the server's for one request; `of_bare` are the shares of the bare loop's
    rate, and of its CPU time in the server's."""

    server: str
    model: str
    protocol: str
    concurrency: int
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    num_bad: int
    other_cores: float
    of_bare: tuple[float, float] = (0.0, 0.0)


def our_server(repository: Path, ports: Ports, log: Path) -> ServerProcess:
    command = [
        str(Path(sys.executable).parent / "enginehouse"),
        "serve",
        f"--model-repository={repository}",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        "--allow-openai=false",
    ]
    return ServerProcess("enginehouse", command, ports, log, {})


class Requests:
    """The bytes of each request, and the check of one answer before anything is measured."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._expected: dict[str, Any] = {}

    def http(self, work: Workload) -> tuple[Path, dict[str, str]]:
        import tritonclient.http as client

        inputs = []
        for name, array in work.inputs.items():
            kind = "FP32" if array.dtype == np.float32 else "INT64"
            inputs.append(client.InferInput(name, list(array.shape), kind).set_data_from_numpy(array))
        outputs = [client.InferRequestedOutput(work.output, binary_data=True)]
        body, size = client.InferenceServerClient.generate_request_body(inputs, outputs=outputs)
        path = self._folder / f"{work.name}.http"
        path.write_bytes(body)
        return path, {"Inference-Header-Content-Length": str(size)} if size else {}

    def grpc(self, work: Workload) -> Path:
        from tritonclient.grpc import service_pb2

        message = service_pb2.ModelInferRequest(model_name=work.name)
        for name, array in work.inputs.items():
            kind = "FP32" if array.dtype == np.float32 else "INT64"
            message.inputs.add(name=name, datatype=kind, shape=array.shape)
            message.raw_input_contents.append(array.tobytes())
        path = self._folder / f"{work.name}.grpc"
        path.write_bytes(message.SerializeToString())
        return path

    def check(self, server: ServerProcess, work: Workload) -> int:
        """Bytes of a gRPC answer with its prefix. Ends the program if the answer is wrong."""
        import grpc
        from tritonclient.grpc import service_pb2

        request = service_pb2.ModelInferRequest.FromString(self.grpc(work).read_bytes())
        options = [("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(f"127.0.0.1:{server.ports.grpc}", options=options) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", _as_is, _as_is)
            data: bytes = call(request.SerializeToString(), timeout=60)
        answer = service_pb2.ModelInferResponse.FromString(data)
        values = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(work.output_shape)
        if not np.allclose(values, self._reference(work), atol=1e-3):
            raise SystemExit(f"{server.name} answers {work.name} wrongly")
        return len(data) + 5

    def _reference(self, work: Workload) -> Any:
        if work.name not in self._expected:
            if work.is_onnx:
                path = self._folder / "artifacts" / f"{work.name}.onnx"
                self._expected[work.name] = session(path).run([work.output], dict(work.inputs))[0]
            else:
                self._expected[work.name] = next(iter(work.inputs.values()))
        return self._expected[work.name]


def _as_is(data: bytes) -> bytes:
    return data


def measure(
    server: ServerProcess, work: Workload, protocol: str, concurrency: int, seconds: float, requests: Requests
) -> Row:
    """Load from another process; the server's CPU time is read around the measured stretch."""
    job: dict[str, Any] = {
        "protocol": protocol,
        "concurrency": concurrency,
        "warm_up_s": WARM_UP_S,
        "duration_s": seconds,
    }
    if protocol == "http":
        body, headers = requests.http(work)
        url = f"http://127.0.0.1:{server.ports.http}/v2/models/{work.name}/infer"
        job |= {"url": url, "headers": headers, "body": str(body)}
    else:
        job |= {
            "address": f"127.0.0.1:{server.ports.grpc}",
            "path": "/inference.GRPCInferenceService/ModelInfer",
            "num_answer_bytes": requests.check(server, work),
            "body": str(requests.grpc(work)),
        }
    result, cpu_s, other_cores = _run_load(server, job)
    return Row(
        server.name,
        work.name,
        protocol,
        concurrency,
        result.requests_per_second,
        result.p50_ms,
        result.p99_ms,
        cpu_s / max(1, result.num_good) * 1000,
        result.num_bad + result.num_lost,
        other_cores,
    )


def _run_load(server: ServerProcess, job: dict[str, Any]) -> tuple[LoadResult, float, float]:
    """(result, the server's CPU seconds, how many cores others kept busy), from when the client says that it
    starts to count until it has ended."""
    command = [sys.executable, "-m", "tests.bench.load"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(json.dumps(job))
        client.stdin.close()
        client.stdout.readline()
        before_s, busy_s = server.cpu_s(), machine_busy_s()
        answer = client.stdout.readline()
        cpu_s, busy_s = server.cpu_s() - before_s, machine_busy_s() - busy_s
    if client.returncode or not answer:
        raise SystemExit(f"the load client failed with {client.returncode}")
    result = LoadResult(**json.loads(answer))
    if not result.num_good:
        raise SystemExit(f"no good answer from {server.name}: {result}")
    other_s = busy_s - cpu_s - result.client_cpu_s
    return result, cpu_s, max(0.0, other_s) / (result.ended_s - result.started_s)


def bare_row(folder: Path, work: Workload, concurrency: int, seconds: float) -> Row:
    figures = bare_loop(folder, work, min(concurrency, work.max_batch_size), seconds)
    rate, cpu_ms = figures["rows_per_second"], figures["cpu_s_per_row"] * 1000
    return Row("bare loop", work.name, "-", concurrency, rate, 0, 0, cpu_ms, 0, figures["other_cores"])


def bare_loop(folder: Path, work: Workload, batch_size: int, seconds: float) -> dict[str, float]:
    path = folder / "artifacts" / f"{work.name}.onnx"
    command = [sys.executable, "-m", "tests.bench.bare_loop", str(path), work.name, str(batch_size), str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=environment)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def run(args: argparse.Namespace, folder: Path, console: Console) -> list[Row]:
    workloads = [WORKLOADS[model] for model in args.models.split(",")]
    ours, tritons = make_repositories(folder, workloads, args.delay_us)
    requests = Requests(folder)
    base = args.port
    servers = [our_server(ours, Ports(base, base + 1, base + 2), folder / "enginehouse.log")]
    if args.peer and triton_peer.is_installed():
        servers.append(triton_peer.process(tritons, Ports(base + 10, base + 11, base + 12), folder / "triton.log"))
    elif args.peer:
        console.print("no Triton to compare with (make peer installs one)")
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        for work in workloads:
            for server in servers:
                requests.check(server, work)
            for concurrency in map(int, args.concurrency.split(",")):
                bare: Row | None = None
                if work.is_onnx:
                    bare = quietest(args.tries, partial(bare_row, folder, work, concurrency, args.seconds))
                    rows.append(bare)
                    show(console, bare)
                for protocol in args.protocols.split(","):
                    for server in servers:
                        how = partial(measure, server, work, protocol, concurrency, args.seconds, requests)
                        rows.append(beside(quietest(args.tries, how), bare))
                        show(console, rows[-1])
    return rows


def quietest(tries: int, how: Callable[[], Row]) -> Row:
    """The one of so many measurements during which others disturbed least; a quiet one ends the search."""
    best = how()
    for _ in range(tries - 1):
        if best.other_cores < QUIET_CORES:
            break
        best = min(best, how(), key=lambda row: row.other_cores)
    return best


def beside(row: Row, bare: Row | None) -> Row:
    if bare is None:
        return row
    share = row.requests_per_second / bare.requests_per_second
    return dataclasses.replace(row, of_bare=(share, bare.cpu_ms / row.cpu_ms if row.cpu_ms else 0.0))


def show(console: Console, row: Row) -> None:
    share = f"{row.of_bare[0]:5.0%} of bare, {row.of_bare[1]:4.0%} of its CPU" if row.of_bare[0] else ""
    bad = f"  {row.num_bad} BAD" if row.num_bad else ""
    console.print(
        f"{row.server:<12}{row.model:<10}{row.protocol:<5}{row.concurrency:>4}  "
        f"{row.requests_per_second:>9.1f}/s  p50 {row.p50_ms:>8.2f} ms  p99 {row.p99_ms:>8.2f} ms  "
        f"cpu {row.cpu_ms:>8.3f} ms  others {row.other_cores:4.2f}  {share}{bad}",
        highlight=False,
    )


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each model, protocol and concurrency, with the ratios of one run."""
    lines = []
    by_key = {(row.server, row.model, row.protocol, row.concurrency): row for row in rows}
    for row in rows:
        if row.server != "enginehouse":
            continue
        peer = by_key.get(("triton", row.model, row.protocol, row.concurrency))
        lines.append(
            [
                row.model,
                row.protocol,
                str(row.concurrency),
                f"{row.requests_per_second:.0f}",
                f"{row.cpu_ms:.3f}",
                f"{row.p50_ms:.2f} / {row.p99_ms:.2f}",
                f"{row.of_bare[0]:.0%} / {row.of_bare[1]:.0%}" if row.of_bare[0] else "–",
                f"{peer.requests_per_second:.0f}" if peer else "–",
                f"{row.requests_per_second / peer.requests_per_second:.2f}" if peer else "–",
                f"{row.cpu_ms / peer.cpu_ms:.2f}" if peer and peer.cpu_ms else "–",
                f"{max(row.other_cores, peer.other_cores if peer else 0):.1f}",
            ]
        )
    return lines


HEADERS = ("model", "protocol", "at once", "requests/s", "CPU ms", "p50 / p99 ms", "of bare loop", "Triton requests/s",
           "× its rate", "× its CPU", "cores of others")  # fmt: skip


def report(path: Path, rows: Sequence[Row], command: str) -> None:
    """Between `<!-- bench -->` and `<!-- /bench -->` of a Markdown file."""
    cpu = f"{psutil.cpu_count()} × {_cpu_name()}"
    lines = [
        f"{datetime.date.today().isoformat()}, `{command}`, {cpu}, Python {platform.python_version()}.",
        "",
        "| " + " | ".join(HEADERS) + " |",
        "|" + "---|" * len(HEADERS),
        *("| " + " | ".join(line) + " |" for line in table(rows)),
    ]
    text = path.read_text()
    block = "<!-- bench -->\n" + "\n".join(lines) + "\n<!-- /bench -->"
    path.write_text(re.sub(r"<!-- bench -->.*?<!-- /bench -->", lambda _: block, text, flags=re.DOTALL))


def _cpu_name() -> str:
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--models", default="identity,minilm,resnet18")
    parser.add_argument("--protocols", default="http,grpc")
    parser.add_argument("--concurrency", default="1,16,64")
    parser.add_argument("--delay-us", type=int, default=0, help="queue delay of the ONNX models")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--tries", type=int, default=1, help="measure again while others disturb")
    parser.add_argument("--port", type=int, default=18500)
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=Path, nargs="+", help="report what --json of earlier runs wrote")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    console = Console(width=160)
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    if args.rows:
        rows = [Row(**each) for path in args.rows for each in json.loads(path.read_text())]
    else:
        rows = run(args, folder, console)
    shown = Table(*HEADERS)
    for line in table(rows):
        shown.add_row(*line)
    console.print(shown)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    if args.report:
        report(args.report, rows, "python -m tests.bench " + " ".join(sys.argv[1:]))


if __name__ == "__main__":
    main()
