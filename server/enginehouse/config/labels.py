"""The label files of outputs, for the classification extension: one label a line."""

from __future__ import annotations

from pathlib import Path

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import Internal, Unsupported


def read_labels(config: ModelConfig, model_directory: Path) -> dict[str, list[str]]:
    """Labels by output. Raises Internal for a file that can't be read, Unsupported for one outside."""
    labels: dict[str, list[str]] = {}
    for output in config.output:
        if not output.label_filename:
            continue
        path = model_directory / output.label_filename
        if not path.resolve().is_relative_to(model_directory.resolve()):
            raise Unsupported(
                f"label file path '{path}' for output '{output.name}' in model '{config.name}' is outside "
                "model directory"
            )
        try:
            labels[output.name] = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise Internal(f"failed to open text file for read {path}: {error.strerror}") from None
    return labels
