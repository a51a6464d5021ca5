"""Runs the Triton kernels of this folder on the CPU through Triton's interpreter, or on a GPU as they are."""

from __future__ import annotations

import os
import zlib

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.importorskip("triton", reason="the kernels' language; in the `test` extra")
torch = pytest.importorskip("torch")

DEVICE = os.environ.get("ENGINEHOUSE_TEST_DEVICE", "cpu")
"""On a GPU the same tests run the compiled kernels (`python -m tests.gpu llm-kernels`)."""
if DEVICE.startswith("cuda"):
    torch.set_default_device(DEVICE)
else:
    from enginehouse_backends.llm.kernels import interpreting

    interpreting.install()


@pytest.fixture(autouse=True)
def _inputs_of_their_own(request: pytest.FixtureRequest) -> None:
    """Random inputs that differ from test to test and are the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
