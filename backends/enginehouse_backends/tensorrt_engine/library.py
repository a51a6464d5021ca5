"""The TensorRT library: the full one, or the lean runtime, which runs version-compatible plans.

Without an NVIDIA driver neither may be called at all: `Runtime` comes back broken and the next call ends the
process. `require_gpu` stands before every first call.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from enginehouse.errors import Unavailable, Unsupported


def load_library() -> Any:
    """Raises Unavailable, saying what to install, where there is none."""
    for name in ("tensorrt", "tensorrt_lean"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as problem:
            if problem.name != name:
                raise
    raise Unavailable(
        "backend 'tensorrt' can't be imported: No module named 'tensorrt': install it with pip install "
        "'enginehouse[tensorrt]'"
    )


def require_gpu(what: str) -> None:
    """Raises Unsupported where TensorRT would crash."""
    if not torch.cuda.is_available():
        raise Unsupported(
            f"{what} needs TensorRT, and TensorRT needs an NVIDIA GPU with its driver; this machine has none"
        )


class Messages:
    """What TensorRT said last, for the text of the error that follows. Mixed into its ILogger."""

    MAX_KEPT = 5

    def __init__(self) -> None:
        self.errors: list[str] = []

    def keep(self, is_error: bool, text: str) -> None:
        if is_error:
            self.errors = [*self.errors[-self.MAX_KEPT + 1 :], text]

    def take(self) -> str:
        """The errors since the last time, or that there were none."""
        text = "; ".join(self.errors) or "TensorRT gave no reason"
        self.errors = []
        return text


def new_logger(library: Any) -> Any:
    """An ILogger with `take()`."""

    class Logger(library.ILogger, Messages):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            Messages.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            self.keep(severity <= library.ILogger.Severity.ERROR, message)

    return Logger()
