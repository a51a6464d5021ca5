"""perf_analyzer in its modes, unchanged, against a real server.

The binary is in tritonclient's wheel; it wants libb64.so.0d (Debian's libb64-0d) and a libcudart.so.12.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

from enginehouse.testing.server import ServerProcess

BINARY = Path(sys.executable).parent / "perf_analyzer"
SITE_PACKAGES = Path(pytest.__file__).parents[1]
CUDA_RUNTIME = SITE_PACKAGES / "nvidia" / "cuda_runtime" / "lib"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BINARY.exists(), reason="no perf_analyzer beside this Python (tritonclient 2.41's wheel)"),
    pytest.mark.skipif(find_library("b64") is None, reason="no libb64.so.0d (Debian's package libb64-0d)"),
]


def analyze(server: ServerProcess, tmp_path: Path, model: str, *flags: str, grpc: bool = False) -> dict[str, str]:
    """The first line of its report."""
    address = server.grpc if grpc else server.http
    report = tmp_path / "report.csv"
    command = [
        *(str(BINARY), "-m", model, "-u", address, "-i", "grpc" if grpc else "http"),
        *("--measurement-mode", "count_windows", "--measurement-request-count", "50"),
        *("--max-trials", "10", "-s", "999", "-f", str(report), *flags),
    ]
    paths = f"{CUDA_RUNTIME}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    done = subprocess.run(
        command, env={**os.environ, "LD_LIBRARY_PATH": paths}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with report.open() as file:
        return next(csv.DictReader(file))


@pytest.mark.parametrize("grpc", [False, True])
def test_concurrency(wire: ServerProcess, tmp_path: Path, grpc: bool) -> None:
    line = analyze(wire, tmp_path, "echo", "--shape", "IN:16", "--concurrency-range", "4", grpc=grpc)
    assert float(line["Inferences/Second"]) > 1
    assert float(line["Server Queue"]) >= 0


def test_request_rate_and_batches(wire: ServerProcess, tmp_path: Path) -> None:
    line = analyze(wire, tmp_path, "echo", "--shape", "IN:16", "--request-rate-range", "50", "-b", "4")
    assert float(line["Inferences/Second"]) > 4


@pytest.mark.parametrize("grpc", [False, True])
def test_system_shared_memory(wire: ServerProcess, tmp_path: Path, grpc: bool) -> None:
    flags = ("--shape", "IN:1024", "--shared-memory", "system", "--output-shared-memory-size", "4096")
    assert float(analyze(wire, tmp_path, "echo", *flags, grpc=grpc)["Inferences/Second"]) > 1


@pytest.mark.parametrize("streaming", [False, True])
def test_sequences(wire: ServerProcess, tmp_path: Path, streaming: bool) -> None:
    flags = ["--sequence-length", "5", "--concurrency-range", "2"] + (["--streaming"] if streaming else [])
    assert float(analyze(wire, tmp_path, "running_sum", *flags, grpc=True)["Inferences/Second"]) > 1


def test_streaming_of_a_decoupled_model(wire: ServerProcess, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text('{"data": [{"IN": {"content": [1, 2, 3], "shape": [3]}}]}')
    flags = ("--streaming", "--input-data", str(data), "--shape", "IN:3")
    assert float(analyze(wire, tmp_path, "repeat", *flags, grpc=True)["Inferences/Second"]) > 1


def test_json_tensors(wire: ServerProcess, tmp_path: Path) -> None:
    flags = ("--shape", "IN:16", "--input-tensor-format", "json", "--output-tensor-format", "json")
    assert float(analyze(wire, tmp_path, "echo", *flags)["Inferences/Second"]) > 1
