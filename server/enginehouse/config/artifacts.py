"""What lies in a model's folder, as far as it tells which backend serves it. The only I/O of completion."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from enginehouse.config.reading import is_hugging_face_config
from enginehouse.config.schema import ModelConfig

_BACKENDS_THAT_FETCH = ("llm", "transformers")
_ENCODER_MARKS = ("modules.json", "config_sentence_transformers.json")


@dataclass(frozen=True, slots=True)
class Artifacts:
    """Of one version's folder."""

    files: frozenset[str] = frozenset()
    folders: frozenset[str] = frozenset()
    is_hugging_face: bool = False
    generates: bool = False
    """A Hugging Face model that continues text."""


def version_numbers(model_directory: Path) -> list[int]:
    """The version folders, ascending. Names with leading zeros or other characters are no versions."""
    names = [entry.name for entry in model_directory.iterdir() if entry.is_dir()]
    return sorted(int(name) for name in names if is_version_name(name))


def is_version_name(name: str) -> bool:
    return name.isascii() and name.isdigit() and name[0] != "0" and len(name) < 19


def version_folders(model_directory: Path, config: ModelConfig) -> dict[int, Path]:
    """The folder of each version. A folder without versions but with an artifact is its own version 1."""
    versions = {version: model_directory / str(version) for version in version_numbers(model_directory)}
    if not versions and _holds_artifact(inspect_folder(model_directory), config):
        return {1: model_directory}
    return versions


def _holds_artifact(artifacts: Artifacts, config: ModelConfig) -> bool:
    names = artifacts.files | artifacts.folders
    if artifacts.is_hugging_face or (config.default_model_filename and config.default_model_filename in names):
        return True
    return config.backend in _BACKENDS_THAT_FETCH and bool(config.serving.llm.model)


def inspect_model(model_directory: Path) -> Artifacts:
    """Of the model's lowest version; of the folder itself where it has no versions."""
    versions = version_numbers(model_directory)
    return inspect_folder(model_directory / str(versions[0]) if versions else model_directory)


def inspect_folder(folder: Path) -> Artifacts:
    entries = list(folder.iterdir())
    files = frozenset(entry.name for entry in entries if entry.is_file())
    folders = frozenset(entry.name for entry in entries if entry.is_dir())
    own_config = folder / "config.json"
    is_hugging_face = "config.json" in files and is_hugging_face_config(own_config)
    generates = is_hugging_face and not files.intersection(_ENCODER_MARKS) and _generates(own_config)
    return Artifacts(files, folders, is_hugging_face, generates)


def _generates(config_path: Path) -> bool:
    """`architectures` names the head that the weights have; only a causal one continues text."""
    content = json.loads(config_path.read_text(encoding="utf-8-sig"))
    architectures = content.get("architectures") or []
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
