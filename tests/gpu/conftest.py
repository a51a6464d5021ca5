"""These tests need an NVIDIA GPU; without one they are skipped. `python -m tests.gpu` runs them in stages.

ENGINEHOUSE_TEST_DEVICE=simulated:0 tries test_llm.py's code anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("ENGINEHOUSE_TEST_DEVICE", "").startswith("simulated"):
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(skip)
