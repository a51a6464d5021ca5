"""What a repository's entries mean: which are models, which versions they have, what belongs to a version.

Three layouts: a folder with version folders (`NAME/1/model.onnx`); a folder that is its own version 1
(`NAME/model.onnx`, or a Hugging Face folder); a bare file (`NAME.onnx`). Reads folders, changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from enginehouse.config.backends import FORMAT_BY_SUFFIX
from enginehouse.config.schema import ModelConfig


@dataclass(frozen=True, slots=True)
class Entry:
    """Something at the top of a repository."""

    name: str
    is_folder: bool


@dataclass(frozen=True, slots=True)
class Brought:
    """A local folder with what an entry holds: a model's folder, or the folder that a bare file is in."""

    folder: Path
    keeper: object = None
    """The folder stays as long as this object."""


def models_in(entries: Iterable[Entry]) -> dict[str, Entry]:
    """The entry of each model. Names that begin with a dot or `__` are none: half-made or not meant to be."""
    models: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.is_folder):  # a folder wins over a file
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_folder:
            models[entry.name] = entry
        elif (suffix := Path(entry.name).suffix) in FORMAT_BY_SUFFIX:
            models[entry.name.removesuffix(suffix)] = entry
    return models


def belongs_to(entry: Entry, sibling: Entry) -> bool:
    """Whether `sibling` is a further file of the bare file `entry`: `net.onnx.data` of `net.onnx`."""
    return not sibling.is_folder and sibling.name.startswith(f"{entry.name}.")


def pick_versions(config: ModelConfig, folders: Mapping[int, Path]) -> dict[int, Path]:
    """Those that the config's version policy wants, by number."""
    policy = config.version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            return dict(folders)
        case "specific":
            return {version: folders[version] for version in policy.specific.versions if version in folders}
        case choice:
            number = policy.latest.num_versions if choice == "latest" else 1
            return {version: folders[version] for version in sorted(folders, reverse=True)[:number]}


def files_of(folder: Path) -> Iterator[Path]:
    """Every file below, in a fixed order; none where there is no folder."""
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
        for name in sorted(files):
            yield Path(parent) / name
