"""A config's `parameters` as numbers and switches, and how many threads a model gets that asks for none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument


class Parameters:
    """Errors name the model, the key, what was found and what is allowed."""

    def __init__(self, config: ModelConfig) -> None:
        self._model_name = config.name
        self.values = {key: parameter.string_value for key, parameter in config.parameters.items()}

    def number(self, key: str) -> int | None:
        text = self.values.get(key, "").strip()
        if not text:
            return None
        try:
            return int(text)
        except ValueError:
            raise self._error(key, text, "a whole number") from None

    def switch(self, key: str) -> bool | None:
        text = self.values.get(key, "").strip().lower()
        if not text:
            return None
        if text in ("1", "true"):
            return True
        if text in ("0", "false"):
            return False
        raise self._error(key, text, "1, 0, true or false")

    def choice(self, key: str, allowed: Mapping[int, Any]) -> Any:
        number = self.number(key)
        if number is None:
            return None
        if number not in allowed:
            raise self._error(key, str(number), f"one of {', '.join(map(str, allowed))}")
        return allowed[number]

    def _error(self, key: str, found: str, allowed: str) -> InvalidArgument:
        return InvalidArgument(f"model '{self._model_name}': parameter '{key}' is '{found}', it must be {allowed}")


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, and the share that its container was given."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def default_threads(config: ModelConfig) -> int:
    """The CPUs divided among the model's CPU instances. Never 0: ONNX Runtime would pin its threads."""
    counts = [max(group.count, 1) for group in config.instance_group if group.kind != group.KIND_GPU]
    return max(1, available_cpus() // max(1, sum(counts)))
