"""Configs for tests, written as people write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from enginehouse.config.artifacts import Artifacts
from enginehouse.config.completion import complete_backend, normalise
from enginehouse.config.reading import parse_config
from enginehouse.config.schema import ModelConfig

DATA = Path(__file__).parent / "data"
PYTHON_ARTIFACTS = Artifacts(files=frozenset({"model.py"}))


def recorded(name: str) -> dict[str, Any]:
    """What a real Triton answered, by model."""
    content: dict[str, Any] = json.loads((DATA / name).read_text())
    return content


def from_text(content: str, name: str = "m") -> ModelConfig:
    """The config of a config.pbtxt, as it is after the model is found."""
    config = parse_config(content, ".pbtxt").config
    return normalise(complete_backend(config, name, PYTHON_ARTIFACTS))
