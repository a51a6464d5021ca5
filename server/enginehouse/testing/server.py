"""A real server in a process of its own, for tests and benchmarks: `with ServerProcess([...]) as server:`.

Ports are free ones on 127.0.0.1; the process ends with the block, and its log is kept for whoever asks why.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """`enginehouse serve` on these repositories. `flags` are added to what is needed."""

    def __init__(
        self,
        repositories: Sequence[Path | str],
        flags: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        ready_timeout_s: float = 120.0,
        wait_ready: bool = True,
    ) -> None:
        self.http_port, self.grpc_port, self.metrics_port = (free_port() for _ in range(3))
        self._command = [
            *(sys.executable, "-m", "enginehouse", "serve"),
            *(f"--model-repository={path}" for path in repositories),
            *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1"),
            *(f"--http-port={self.http_port}", f"--grpc-port={self.grpc_port}"),
            f"--metrics-port={self.metrics_port}",
            *flags,
        ]
        self._environment = {**os.environ, **(environment or {})}
        self._ready_timeout_s = ready_timeout_s
        self._wait_ready = wait_ready
        self._log = tempfile.NamedTemporaryFile("w+", prefix="enginehouse-", suffix=".txt")  # noqa: SIM115
        self.process: subprocess.Popen[str] | None = None

    @property
    def http(self) -> str:
        """host:port, as tritonclient wants it."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server is not running"
        return self.process.pid

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, stdout=self._log, stderr=subprocess.STDOUT, env=self._environment, text=True
        )
        if self._wait_ready:
            try:
                self._until_ready()
            except BaseException:
                self.stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._log.close()

    def stop(self, timeout_s: float = 40.0) -> int:
        """Sends SIGTERM and waits; kills what doesn't end. The exit status."""
        process = self.process
        assert process is not None, "the server is not running"
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.wait()

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _until_ready(self) -> None:
        deadline_s = time.monotonic() + self._ready_timeout_s
        assert self.process is not None, "set by __enter__"
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log[-4000:]}")
            if self.is_ready():
                return
            time.sleep(0.05)
        raise TimeoutError(f"the server was not ready in {self._ready_timeout_s} s:\n{self.log[-4000:]}")
