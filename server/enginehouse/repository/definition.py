"""A model as the repository describes it at one moment, before anything of it is loaded. Data only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from enginehouse.config.schema import ModelConfig
from enginehouse.repository.agents import AgentChain

NAMESPACE_END = "::"
"""With namespaces, models are known by `<repository>::<name>`, so that names may repeat."""


def plain_name(name: str) -> str:
    """As clients say it, without a namespace."""
    return name.rpartition(NAMESPACE_END)[2]


class PollError(Exception):
    """The model can't be found or its config can't be read; the text says which and where."""


class NotUnique(PollError):
    """The name is in more than one repository: none of them may serve under it."""


@dataclass(frozen=True, slots=True)
class Override:
    """What a load request brings: a config that replaces the file's, and files (by relative path)."""

    config: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeptOverride:
    """A config that came with a load request. Once it is loaded it stays until the model is unloaded or its
    files change."""

    content: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ModelDefinition:
    name: str
    """With its namespace where there are namespaces."""
    directory: Path
    """Local: config and version folders, or itself the only version's folder."""
    config: ModelConfig
    """As written, normalised as far as it can be without looking into artifacts."""
    versions: Sequence[int]
    """Those that the version policy picks from what lies there, ascending."""
    fingerprints: Mapping[int, str]
    """By version: changes whenever a file of that version changes."""
    keeper: object = None
    """Whatever keeps a temporary `directory` alive as long as the definition."""
    place: str = ""
    """Which model this is a state of: a path or URL; one of a load request's files is like no other."""
    agents: AgentChain | None = None
    """The repository agents that prepared it, and are told what becomes of it."""
    override: KeptOverride | None = None
    """The config that came with the load request, or with an earlier one that loaded."""

    @property
    def on_demand(self) -> bool:
        return self.config.serving.load == self.config.serving.LOAD_ON_DEMAND

    def same_as(self, other: ModelDefinition) -> bool:
        return (
            self.place == other.place
            and self.config == other.config
            and self.fingerprints == other.fingerprints
        )
