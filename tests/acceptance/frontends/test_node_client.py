"""A Node client made from protos/ infers, once and as a stream."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from enginehouse.testing.server import ServerProcess

EXAMPLE = Path(__file__).parents[3] / "clients" / "examples" / "node"

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")


@pytest.fixture(scope="module")
def example() -> Path:
    if not (EXAMPLE / "node_modules").is_dir():
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=EXAMPLE, capture_output=True, text=True, timeout=200)
        if done.returncode != 0:
            pytest.skip(f"npm can't install its packages: {done.stderr[-500:]}")
    return EXAMPLE


def test_it_gets_one_answer_and_a_stream(wire: ServerProcess, example: Path) -> None:
    command = ["node", "infer.js", wire.grpc, "echo", "IN", "repeat", "IN"]
    done = subprocess.run(command, cwd=example, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[1, 2, 3, 4], [7, 8, 9]]


def test_it_reads_the_errors_text(wire: ServerProcess, example: Path) -> None:
    command = ["node", "infer.js", wire.grpc, "nobody", "IN"]
    done = subprocess.run(command, cwd=example, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "Request for unknown model: 'nobody' is not found" in done.stderr) == (1, True)
