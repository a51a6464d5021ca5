"""Reads models from the repositories: which there are, and what one of them is now.

Blocking (files, downloads): call it in a thread. Nothing here changes what serves.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from enginehouse.config import completion, reading, validation
from enginehouse.config.artifacts import is_version_name, version_folders
from enginehouse.config.schema import ModelConfig, ModelServing
from enginehouse.errors import EnginehouseError
from enginehouse.repository.agents import AgentChain, Agents
from enginehouse.repository.definition import (
    NAMESPACE_END,
    KeptOverride,
    ModelDefinition,
    NotUnique,
    Override,
    PollError,
    plain_name,
)
from enginehouse.repository.layout import Entry, belongs_to, files_of, models_in, pick_versions
from enginehouse.repository.storage import LocalRoot, Root

logger = logging.getLogger("enginehouse.repository")

_NO_VERSIONS = frozenset(("configs", "initial_state", "warmup"))
_NO_NUMBER = "fails to convert to integral number"


@dataclass(frozen=True, slots=True)
class _Found:
    """A model in one of the repositories, or in a load request, brought here."""

    name: str
    place: str
    folder: Path
    keeper: object = None
    bare_file: Entry | None = None

    def files(self) -> Iterable[Path]:
        if self.bare_file is None:
            return files_of(self.folder)
        siblings = (Entry(path.name, path.is_dir()) for path in self.folder.iterdir())
        further = sorted(sibling.name for sibling in siblings if belongs_to(self.bare_file, sibling))
        return [self.folder / name for name in (self.bare_file.name, *further)]


class Repositories:
    """lifecycle.ModelSource over repositories here and in clouds. A name may be in one of them only."""

    def __init__(
        self,
        roots: Sequence[Root | Path],
        *,
        variant: str = "",
        complete_configs: bool = True,
        agents: Agents | None = None,
        has_namespaces: bool = False,
    ) -> None:
        self.roots: list[Root] = [LocalRoot(root) if isinstance(root, Path) else root for root in roots]
        self._variant = variant
        self._complete_configs = complete_configs
        self._agents = agents or Agents()
        self._has_namespaces = has_namespaces
        self._overrides: dict[str, KeptOverride] = {}
        self._ignored: set[Path] = set()
        self._prepared: dict[str, tuple[str, AgentChain]] = {}

    @property
    def watched_folders(self) -> list[Path]:
        """Where changes can be noticed; what is elsewhere must be looked at."""
        return [root.watched_folder for root in self.roots if root.watched_folder is not None]

    def names(self) -> list[str]:
        return sorted({self._key(root, name) for root in self.roots for name in models_in(root.entries())})

    def known_names(self) -> list[str]:
        """As last seen: never waits for a network."""
        return sorted({self._key(root, name) for root in self.roots for name in models_in(root.known_entries())})

    def known_duplicates(self) -> set[str]:
        """Names that are in more than one repository. As last seen: never waits for a network."""
        seen = Counter(self._key(root, name) for root in self.roots for name in models_in(root.known_entries()))
        return {name for name, number in seen.items() if number > 1}

    def keys_of(self, name: str) -> list[str]:
        """The models that a name means: with namespaces, those of that name in all of them."""
        if not self._has_namespaces or NAMESPACE_END in name:
            return [name]
        return [self._key(root, name) for root in self.roots if root.find(name) is not None] or [name]

    def _key(self, root: Root, name: str) -> str:
        return f"{root.url}{NAMESPACE_END}{name}" if self._has_namespaces else name

    def poll(self, name: str, override: Override | None) -> ModelDefinition:
        try:
            if override is not None and override.files:
                return self._poll_files(name, override)
            return self._poll_repository(name, override.config if override is not None else None)
        except EnginehouseError as error:
            raise PollError(error.message) from error

    def is_on_demand(self, name: str) -> bool:
        """Whether the model's config leaves its loading to the first request. False if it can't be read."""
        try:
            root, entry = self._holder(name)
            if not entry.is_folder:
                return False
            peeked = root.peek(entry, plain_name(name))
            read = reading.read_config(peeked.folder, self._variant)
        except (PollError, EnginehouseError):
            return False
        return read is not None and read.config.serving.load == ModelServing.LOAD_ON_DEMAND

    def loaded(self, definition: ModelDefinition) -> None:
        if definition.override is not None:
            self._overrides[definition.name] = definition.override
        else:
            self._overrides.pop(definition.name, None)

    def forget_override(self, name: str) -> None:
        self._overrides.pop(name, None)

    def _poll_repository(self, name: str, content: str | None) -> ModelDefinition:
        found = self._find(name)
        fingerprint = _fingerprint(found.files(), found.folder)
        if content is None and (kept := self._overrides.get(name)) is not None:
            content = kept.content if kept.fingerprint == fingerprint else None
        definition = self._define(found, content, fingerprint)
        return definition if content is None else replace(definition, override=KeptOverride(content, fingerprint))

    def _holder(self, name: str) -> tuple[Root, Entry]:
        namespace, end, plain = name.rpartition(NAMESPACE_END) if self._has_namespaces else ("", "", name)
        roots = [root for root in self.roots if not end or root.url == namespace]
        holders = [(root, entry) for root in roots if (entry := root.find(plain)) is not None]
        if not holders:
            looked = ", ".join(root.url for root in self.roots)
            raise PollError(f"no model '{name}' in {looked}")
        if len(holders) > 1:
            places = ", ".join(root.url for root, _ in holders)
            raise NotUnique(f"failed to poll model '{name}': not unique across all model repositories: {places}")
        return holders[0]

    def _find(self, name: str) -> _Found:
        root, entry = self._holder(name)
        brought = root.bring(entry, plain_name(name) if self._has_namespaces else name)
        bare_file = None if entry.is_folder else entry
        if bare_file is not None and (brought.folder / "1").is_dir():
            raise PollError(f"the file '{entry.name}' can't be a model beside a folder named '1'")
        return _Found(name, f"{root.url}/{entry.name}", brought.folder, brought.keeper, bare_file)

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
        found = _Found(name, str(directory), directory, keeper)
        return self._define(found, override.config, _fingerprint(found.files(), directory))

    def _define(self, found: _Found, content: str | None, fingerprint: str) -> ModelDefinition:
        written = self._read_config(found, content)
        chain = self._prepare(found, written, fingerprint)
        folder = chain.folder if chain is not None else found.folder
        plain = plain_name(found.name) if self._has_namespaces else found.name
        config = completion.at_poll(written, folder, plain)
        validation.validate(config, plain)
        if not self._complete_configs:
            validation.validate_tensors(config)
        if self._has_namespaces:
            self._enter_namespace(config, found.name)
        bare = {1: folder} if found.bare_file is not None else None
        versions = pick_versions(config, bare or version_folders(folder, config))
        self._warn_of_ignored(folder)
        fingerprints = {
            version: _fingerprint(found.files() if bare else files_of(path), path) for version, path in versions.items()
        }
        return ModelDefinition(
            found.name, folder, config, sorted(versions), fingerprints, (found.keeper, chain), found.place, chain
        )

    def _warn_of_ignored(self, folder: Path) -> None:
        """Of folders beside versions that look as if they were meant to be some; once each."""
        names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
        if not any(is_version_name(name) for name in names):
            return
        for name in sorted(names):
            if is_version_name(name) or name in _NO_VERSIONS or name[0] in "._" or folder / name in self._ignored:
                continue
            self._ignored.add(folder / name)
            why = "contains leading zeros in its directory name" if name.isdigit() else _NO_NUMBER
            logger.warning("ignore version directory '%s' which %s (in %s)", name, why, folder)

    def _enter_namespace(self, config: ModelConfig, key: str) -> None:
        """Its own name and its members' get their namespaces: an ensemble takes those beside it first."""
        config.name = key
        namespace = key.rpartition(NAMESPACE_END)[0]
        for step in config.ensemble_scheduling.step:
            keys = self.keys_of(step.model_name)
            beside = f"{namespace}{NAMESPACE_END}{step.model_name}"
            chosen = beside if beside in keys else keys[0] if len(keys) == 1 else step.model_name
            step.model_namespace, _, _ = chosen.rpartition(NAMESPACE_END)
            step.model_name = chosen

    def _read_config(self, found: _Found, content: str | None) -> ModelConfig:
        if content is not None:
            return reading.parse_config(content, ".json", "the load request's config").config
        if found.bare_file is not None:
            return ModelConfig(default_model_filename=found.bare_file.name)
        read = reading.read_config(found.folder, self._variant)
        if read is None and not self._complete_configs:
            raise PollError(f"model configuration is not provided for model '{found.name}' in {found.folder}")
        return read.config if read is not None else ModelConfig()

    def _prepare(self, found: _Found, config: ModelConfig, fingerprint: str) -> AgentChain | None:
        """Runs the repository agents, once for each state of the model."""
        if not config.model_repository_agents.agents:
            self._prepared.pop(found.name, None)
            return None
        state = f"{found.place}\0{fingerprint}\0{config.SerializeToString(deterministic=True)!r}"
        before = self._prepared.get(found.name)
        if before is not None and before[0] == state:
            return before[1]
        chain = self._agents.prepare(found.name, config, found.folder)
        self._prepared[found.name] = (state, chain)
        return chain


def _fingerprint(files: Iterable[Path], base: Path) -> str:
    """Changes with the name, size or time of any file."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # being replaced right now: the next look sees it
        digest.update(f"{path.relative_to(base)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _inside(directory: Path, key: str) -> Path:
    """The path under `directory` that a load parameter `file:<path>` names. Raises PollError if it leads out."""
    relative = key.removeprefix("file:")
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise PollError(f"override file '{relative}' is not a path inside the model's folder")
    return directory / pure
