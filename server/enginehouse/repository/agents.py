"""Repository agents: hooks that a config names, run before a model loads and told when it loaded or went.

An agent may refuse the model (a wrong checksum), or give another folder in its place (a decrypted copy). It is
a Python class: `checksum` is built in, others are `Agent` in <repoagent-directory>/<name>/agent.py, or entry
points of the group `enginehouse.repository_agents`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path

from enginehouse.config.problems import nearest_match
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument, NotFound, Unsupported

logger = logging.getLogger("enginehouse.repository")

ENTRY_POINTS = "enginehouse.repository_agents"


class Event(StrEnum):
    """What agents are told after their own part."""

    LOADED = "loaded"
    LOAD_FAILED = "load failed"
    UNLOADING = "unloading"
    UNLOADED = "unloaded"


@dataclass(slots=True)
class AgentModel:
    """The model as one agent sees it. `folder` is what the agent before it left."""

    name: str
    config: ModelConfig
    folder: Path
    parameters: Mapping[str, str]
    _made: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list)

    def new_folder(self) -> Path:
        """An empty folder that is kept as long as the model."""
        made = tempfile.TemporaryDirectory(prefix=f"enginehouse-{self.name}-")
        self._made.append(made)
        return Path(made.name)


class RepositoryAgent(ABC):
    """Made anew for each model that names it. Called in a thread; may block."""

    @abstractmethod
    def prepare(self, model: AgentModel) -> Path | None:
        """Before the model loads: the folder to load from, None for the same. Raises to refuse the model."""

    def notice(self, model: AgentModel, event: Event) -> None:  # noqa: B027 - to listen is optional
        """Told what became of the model. Errors are logged and change nothing."""


class AgentChain:
    """The agents of one model, in order. Holds the folders that they made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """What the last agent left: where the model is loaded from."""
        self._links: list[tuple[RepositoryAgent, AgentModel]] = []

    def add(self, agent: RepositoryAgent, model: AgentModel) -> None:
        self.folder = agent.prepare(model) or model.folder
        self._links.append((agent, model))

    def notice(self, event: Event) -> None:
        """In order when it loaded, the other way round otherwise."""
        links = self._links if event is Event.LOADED else reversed(self._links)
        for agent, model in links:
            try:
                agent.notice(model, event)
            except Exception:  # an agent's own code; the model is what it is
                logger.exception("repository agent %s of '%s', %s", type(agent).__name__, model.name, event)


class Agents:
    """Finds agents by name."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    def prepare(self, name: str, config: ModelConfig, folder: Path) -> AgentChain:
        """Runs the model's agents. Raises NotFound for one that isn't there, or what an agent raises."""
        chain = AgentChain(folder)
        for wanted in config.model_repository_agents.agents:
            agent = self._class(wanted.name)()
            chain.add(agent, AgentModel(name, config, chain.folder, dict(wanted.parameters)))
        return chain

    def _class(self, name: str) -> type[RepositoryAgent]:
        if name == "checksum":
            return ChecksumAgent
        if self._directory is not None and (path := self._directory / name / "agent.py").is_file():
            return _load_class(name, path)
        points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        if name in points:
            found: type[RepositoryAgent] = points[name].load()
            return found
        known = ["checksum", *points, *self._names_in_directory()]
        nearest = nearest_match(name, known)
        hint = f"did you mean '{nearest}'?" if nearest else f"there are {', '.join(known)}"
        raise NotFound(f"there is no repository agent '{name}'; {hint}")

    def _names_in_directory(self) -> Sequence[str]:
        if self._directory is None or not self._directory.is_dir():
            return []
        return sorted(path.parent.name for path in self._directory.glob("*/agent.py"))


def _load_class(name: str, path: Path) -> type[RepositoryAgent]:
    spec = importlib.util.spec_from_file_location(f"enginehouse_repository_agent_{name}", path)
    assert spec is not None, "a .py file always has a spec: a bug"
    assert spec.loader is not None, "a .py file always has a loader: a bug"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, "Agent", None)
    if not (isinstance(found, type) and issubclass(found, RepositoryAgent)):
        raise InvalidArgument(f"repository agent '{name}': {path} has no class Agent(RepositoryAgent)")
    return found


class ChecksumAgent(RepositoryAgent):
    """Refuses a model whose files don't have the hashes of its parameters: "MD5:1/model.onnx" → hash.

    Any algorithm of hashlib may stand before the colon.
    """

    def prepare(self, model: AgentModel) -> Path | None:
        for key, expected in sorted(model.parameters.items()):
            algorithm, colon, relative = key.partition(":")
            if not colon:
                raise InvalidArgument(f"failed to parse key: {key}")
            found = _hash_of(model.folder, relative, algorithm)
            if found != expected.lower():
                raise InvalidArgument(
                    f"Mismatched {algorithm.upper()} hash for file {relative}, expect: {expected}, got: {found}"
                )
        return None


def _hash_of(folder: Path, relative: str, algorithm: str) -> str:
    name = algorithm.lower().replace("-", "")
    if name not in hashlib.algorithms_available or name.startswith("shake"):
        raise Unsupported(f"Unsupported checksum algorithm: {algorithm}")
    path = folder / relative
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InvalidArgument(f"checksum of a file outside of the model's folder: {relative}")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise InvalidArgument(f"failed to open text file for read {relative}: {error.strerror}") from error
