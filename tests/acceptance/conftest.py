"""One server with the example models for all tests that use them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from enginehouse.testing.server import ServerProcess

EXAMPLES = Path(__file__).parents[2] / "model_repository"


@pytest.fixture(scope="session")
def examples() -> Iterator[ServerProcess]:
    subprocess.run([sys.executable, str(EXAMPLES / "build.py")], check=True, capture_output=True)
    with ServerProcess([EXAMPLES]) as server:
        yield server
