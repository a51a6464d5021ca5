"""One server with models that show what a front end does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from enginehouse.testing.server import ServerProcess

MODELS = Path(__file__).parent / "models"
FLAGS = (
    "--model-control-mode=explicit",
    "--load-model=*",
    "--allow-client-shm=true",
    "--http-header-forward-pattern=^x-test-.*",
    "--grpc-header-forward-pattern=^x-test-.*",
    "--exit-timeout-secs=5",
)


@pytest.fixture(scope="session")
def wire() -> Iterator[ServerProcess]:
    with ServerProcess([MODELS], FLAGS) as server:
        yield server
