"""Which code runs a model: finds a backend by the name in the config.

Installed ones register under the entry point group `enginehouse.backends`; a folder `<name>/model.py` in a
backend directory is a backend too, run by the python backend. Says what to install when an import fails.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from enginehouse.backend import Backend
from enginehouse.errors import InvalidArgument, Unavailable

GROUP = "enginehouse.backends"
BACKEND_MODEL_OPTION = "python-based-backend"
"""Backend option that tells the python backend which model.py stands for a python-based backend."""

_EXTRA_BY_PACKAGE = {
    "onnxruntime": "onnx",
    "torch": "torch",
    "tensorrt": "tensorrt",
    "transformers": "transformers",
    "tokenizers": "transformers",
    "safetensors": "transformers",
}


@dataclass(frozen=True, slots=True)
class BackendSource:
    """How any process gets at a backend: `target` is `module:attribute`; `model_file` is set for one that is
    a model.py of its own."""

    name: str
    target: str
    model_file: str = ""

    def make(self) -> Backend:
        """Raises Unavailable, naming what to install, if the code can't be imported."""
        entry = metadata.EntryPoint(self.name, self.target, GROUP)
        try:
            cls = entry.load()
        except ImportError as problem:
            raise Unavailable(_import_text(self.name, problem)) from problem
        backend = cls()
        if not isinstance(backend, Backend):
            raise InvalidArgument(f"backend '{self.name}': {self.target} is no enginehouse.backend.Backend")
        return backend


def find_backend(name: str, directories: Sequence[Path] = ()) -> BackendSource:
    """Raises InvalidArgument for a name that nothing provides."""
    installed = _installed_targets()
    for directory in directories:
        model_file = directory / name / "model.py"
        if model_file.is_file() and "python" in installed:
            return BackendSource(name, installed["python"], str(model_file))
    if name not in installed:
        raise InvalidArgument(
            f"unable to find backend library for backend '{name}', try specifying runtime on the model configuration."
        )
    return BackendSource(name, installed[name])


def installed_backends() -> dict[str, str]:
    """What packages provide, by name: `module:attribute`."""
    return dict(_installed_targets())


@functools.cache
def _installed_targets() -> dict[str, str]:
    """By name. Asked once a process: reading every installed package's metadata takes 20 ms of the loop."""
    return {entry.name: entry.value for entry in metadata.entry_points(group=GROUP)}


def _import_text(backend: str, problem: ImportError) -> str:
    package = (problem.name or "").partition(".")[0]
    extra = _EXTRA_BY_PACKAGE.get(package)
    advice = f": install it with pip install 'enginehouse[{extra}]'" if extra else ""
    return f"backend '{backend}' can't be imported: {problem}{advice}"
