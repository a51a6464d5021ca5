"""Reads models from the repositories: which there are, and what one of them is now.

Blocking (files): call it in a thread. Nothing here changes what serves.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from enginehouse.config import completion, reading, validation
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError
from enginehouse.repository.definition import ModelDefinition, Override, PollError


@dataclass(frozen=True, slots=True)
class _KeptOverride:
    """A config that came with a load request. It stays until the model is unloaded or its files change."""

    content: str
    fingerprint: str


class Repositories:
    """lifecycle.ModelSource over local folders. A name may be in one of them only."""

    def __init__(self, roots: Sequence[Path], *, variant: str = "") -> None:
        self.roots = list(roots)
        self._variant = variant
        self._overrides: dict[str, _KeptOverride] = {}

    def names(self) -> list[str]:
        found: set[str] = set()
        for root in self.roots:
            if not root.is_dir():
                continue
            found.update(entry.name for entry in os.scandir(root) if _may_be_model(entry))
        return sorted(found)

    def poll(self, name: str, override: Override | None) -> ModelDefinition:
        if override is not None and override.files:
            return self._poll_files(name, override)
        directory = self._directory_of(name)
        fingerprint = _fingerprint(_all_files(directory))
        content: str | None
        if override is not None and override.config is not None:
            content = override.config
        else:
            kept = self._overrides.get(name)
            content = kept.content if kept is not None and kept.fingerprint == fingerprint else None
        definition = self._define(name, directory, content)
        if content is not None:
            self._overrides[name] = _KeptOverride(content, fingerprint)
        else:
            self._overrides.pop(name, None)
        return definition

    def is_on_demand(self, name: str) -> bool:
        """Whether the model's config leaves its loading to the first request. False if it can't be read."""
        try:
            return self.poll(name, None).on_demand
        except PollError:
            return False

    def forget_override(self, name: str) -> None:
        self._overrides.pop(name, None)

    def _directory_of(self, name: str) -> Path:
        holders = [root / name for root in self.roots if (root / name).is_dir()]
        if not holders:
            looked = ", ".join(str(root) for root in self.roots)
            raise PollError(f"no folder '{name}' in {looked}")
        if len(holders) > 1:
            places = ", ".join(str(path) for path in holders)
            raise PollError(f"model '{name}' is in more than one repository: {places}")
        return holders[0]

    def _poll_files(self, name: str, override: Override) -> ModelDefinition:
        if override.config is None:
            raise PollError("override files need the parameter 'config' beside them")
        keeper = tempfile.TemporaryDirectory(prefix="enginehouse-override-")
        directory = Path(keeper.name) / name
        directory.mkdir()
        for relative, content in override.files.items():
            path = _inside(directory, relative)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self._overrides.pop(name, None)
        return self._define(name, directory, override.config, keeper)

    def _define(
        self, name: str, directory: Path, content: str | None, keeper: object = None
    ) -> ModelDefinition:
        try:
            config = self._config(directory, content)
            config = completion.at_poll(config, directory)
            validation.validate(config, name)
        except EnginehouseError as error:
            raise PollError(error.message) from error
        versions = pick_versions(config, _version_folders(directory))
        fingerprints = {
            version: _fingerprint(_all_files(directory / folder)) for version, folder in versions.items()
        }
        return ModelDefinition(name, directory, config, sorted(versions), fingerprints, keeper)

    def _config(self, directory: Path, content: str | None) -> ModelConfig:
        if content is not None:
            return reading.parse_config(content, ".json", "the load request's config").config
        found = reading.read_config(directory, self._variant)
        return found.config if found is not None else ModelConfig()


def pick_versions(config: ModelConfig, folders: dict[int, str]) -> dict[int, str]:
    """The version folders that the config's version policy wants, by number."""
    policy = config.version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return folders
    if kind == "specific":
        return {version: folders[version] for version in policy.specific.versions if version in folders}
    number = policy.latest.num_versions if kind == "latest" else 1
    newest = sorted(folders, reverse=True)[: max(number, 0)]
    return {version: folders[version] for version in newest}


def _version_folders(directory: Path) -> dict[int, str]:
    """Folders named by a positive number; others are not versions."""
    return {
        int(entry.name): entry.name
        for entry in os.scandir(directory)
        if entry.is_dir() and entry.name.isdecimal() and int(entry.name) > 0
    }


def _may_be_model(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__"))


def _all_files(directory: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
        for name in sorted(files):
            yield Path(folder) / name


def _fingerprint(files: Iterable[Path]) -> str:
    """Changes with the name, size or time of any file."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # being replaced right now: the next look sees it
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _inside(directory: Path, key: str) -> Path:
    """The path under `directory` that a load parameter `file:<path>` names. Raises PollError if it leads out."""
    relative = key.removeprefix("file:")
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise PollError(f"override file '{relative}' is not a path inside the model's folder")
    return directory / pure
