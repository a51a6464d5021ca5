"""One run: a server with models, the attacks in rounds, and after each round what a server may not have kept."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import uvloop

from enginehouse.testing.server import ServerProcess
from tests.acceptance.frontends.language_model import save_model
from tests.fuzz import http_seeds
from tests.fuzz.grpc_attack import GrpcAttack
from tests.fuzz.http2_attack import Http2Attack
from tests.fuzz.http_attack import HttpAttack
from tests.fuzz.report import Report

MODELS = Path(__file__).parents[1] / "acceptance" / "frontends" / "models"
FLAGS = (
    "--model-control-mode=explicit",
    "--load-model=*",
    "--allow-client-shm=true",
    "--http-header-forward-pattern=^x-test-.*",
    "--http-max-input-size=1048576",
    "--exit-timeout-secs=10",
)
ROUND = 25_000
"""Requests between two looks at the server."""
_SHARES = {"http": 0.6, "grpc": 0.37, "http2": 0.03}
_GROWTH_BYTES = 64 << 20
_FEW = 8


@dataclass(frozen=True)
class Plan:
    num_requests: int
    seed: int
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kept:
    """What the server's process holds while nobody asks anything."""

    memory_bytes: int
    files: int
    threads: int
    children: int


def fuzz(plan: Plan, say: Callable[[str], None]) -> Report:
    report = Report()
    with tempfile.TemporaryDirectory() as folder, _shared_memory():
        save_model(Path(folder) / "tiny")
        shutil.copytree(MODELS / "echo", Path(folder) / http_seeds.STEADY)
        with ServerProcess([MODELS, Path(folder)], [*FLAGS, *plan.flags]) as server:
            Watch(server, report).run(plan, say)
            if server.stop() != 0:
                report.find(f"the server ended with {server.stop()}", b"SIGTERM", server.log[-2000:])
            if (at := server.log.find("Traceback")) >= 0:
                report.find("a traceback in the log", b"", server.log[max(at - 500, 0) : at + 2500])
    return report


@contextmanager
def _shared_memory() -> Iterator[None]:
    region = SharedMemory(http_seeds.SHARED_MEMORY_KEY, create=True, size=http_seeds.SHARED_MEMORY_BYTES)
    try:
        yield
    finally:
        region.close()
        region.unlink()


class Watch:
    """Attacks the server in rounds and compares what it keeps."""

    def __init__(self, server: ServerProcess, report: Report) -> None:
        self._server = server
        self._process = psutil.Process(server.pid)
        self._report = report

    def run(self, plan: Plan, say: Callable[[str], None]) -> None:
        first: Kept | None = None
        num_rounds = max(2, round(plan.num_requests / ROUND))
        for number in range(num_rounds):
            seed = plan.seed * 1000 + number
            uvloop.run(self._round(seed, plan.num_requests // num_rounds))
            if self._process.status() == psutil.STATUS_ZOMBIE:
                self._report.find("the server has ended", b"", self._server.log[-3000:])
                return
            self._tidy()
            kept = self._kept()
            say(f"round {number + 1} of {num_rounds}: {kept}, {len(self._report.findings)} findings")
            first = first or kept
            self._compare(first, kept)
            if self._report.findings:
                return

    async def _round(self, seed: int, num_requests: int) -> None:
        host, server, report = "127.0.0.1", self._server, self._report
        await HttpAttack(host, server.http_port, seed, report).run(int(num_requests * _SHARES["http"]), 32)
        await GrpcAttack(server.grpc, seed, report).run(int(num_requests * _SHARES["grpc"]), 32)
        await Http2Attack(host, server.grpc_port, seed, report).run(int(num_requests * _SHARES["http2"]), 32)

    def _tidy(self) -> None:
        """Undoes what spoilt requests were entitled to do."""
        self._post("/v2/systemsharedmemory/unregister")
        self._post("/v2/logging", {"log_verbose_level": 0, "log_info": True})
        off = {"trace_level": ["OFF"], "trace_rate": "1000", "trace_count": "-1", "log_frequency": "0"}
        self._post("/v2/trace/setting", off)
        for model in sorted(path.name for path in MODELS.iterdir()):
            self._post(f"/v2/repository/models/{model}/load")
        for model in ("tiny", http_seeds.STEADY):
            self._post(f"/v2/repository/models/{model}/load")

    def _post(self, path: str, document: object = None) -> None:
        data = b"" if document is None else json.dumps(document).encode()
        try:
            with urllib.request.urlopen(f"http://{self._server.http}{path}", data, timeout=30) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            self._report.find(f"{path} failed with {error.code}", data, error.read())

    def _kept(self) -> Kept:
        """Once it is quiet: connections close and the last requests end a moment after their clients leave."""
        deadline_s = time.monotonic() + 10
        while (waiting := self._num_pending()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        if waiting:
            self._report.find(f"{waiting} requests are in flight though nobody asks", b"")
        while (sockets := len(self._process.net_connections())) > _FEW and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return Kept(
            self._process.memory_info().rss,
            self._process.num_fds() - sockets,
            self._process.num_threads(),
            len(self._process.children(recursive=True)),
        )

    def _num_pending(self) -> int:
        with urllib.request.urlopen(self._server.metrics_url, timeout=10) as answer:
            text = answer.read().decode()
        found = re.findall(r"^nv_inference_pending_request_count\{.*\} (\d+)", text, re.MULTILINE)
        return sum(map(int, found))

    def _compare(self, first: Kept, now: Kept) -> None:
        if now.memory_bytes > first.memory_bytes + _GROWTH_BYTES:
            self._report.find(f"memory grew from {first.memory_bytes} to {now.memory_bytes} bytes", b"")
        if now.files > first.files + _FEW:
            self._report.find(f"open files grew from {first.files} to {now.files}", b"")
        if now.threads > first.threads + _FEW:
            self._report.find(f"threads grew from {first.threads} to {now.threads}", b"")
        if now.children != first.children:
            self._report.find(f"processes changed from {first.children} to {now.children}", b"")
