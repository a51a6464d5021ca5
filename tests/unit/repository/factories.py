"""What the repository tests are made of: models without hosts, and a builder that does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import text_format

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.execution.ledger import InsufficientMemory
from enginehouse.repository.definition import ModelDefinition, Override, PollError
from enginehouse.repository.registry import Registry, ServedVersion


def served(name: str = "m", version: int = 1, config: ModelConfig | None = None) -> ServedVersion:
    return ServedVersion(name, version, config or ModelConfig(name=name), {}, {})


def definition(
    name: str = "m", versions: Mapping[int, str] | None = None, text: str = ""
) -> ModelDefinition:
    """`versions` gives each version's fingerprint; `text` is more config as pbtxt."""
    config = ModelConfig(name=name)
    text_format.Merge(text, config)
    found = versions if versions is not None else {1: "a"}
    return ModelDefinition(name, Path("/models") / name, config, sorted(found), found)


@dataclass
class Source:
    """A repository in memory."""

    models: dict[str, ModelDefinition] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    """Why some can't be read."""

    def names(self) -> list[str]:
        return sorted(self.models)

    def poll(self, name: str, override: Override | None) -> ModelDefinition:
        if name in self.broken:
            raise PollError(self.broken[name])
        if name not in self.models:
            raise PollError(f"no folder '{name}'")
        return self.models[name]

    def loaded(self, definition: ModelDefinition) -> None:
        """There are no overrides here."""

    def forget_override(self, name: str) -> None:
        """There are no overrides here."""


@dataclass
class Builder:
    """Builds at once, fails on the versions that it is told to, and remembers what is up."""

    registry: Registry
    broken: set[tuple[str, int]] = field(default_factory=set)
    up: list[ServedVersion] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    limit: int = 1 << 60
    """Bytes that all models may hold together, by `sizes`."""
    busy: asyncio.Event | None = None
    """Set it to keep retiring versions until the event is set: requests in flight."""

    async def build(self, found: ModelDefinition, version: int) -> ServedVersion:
        await asyncio.sleep(0)
        if (found.name, version) in self.broken:
            raise InvalidArgument("no luck")
        missing = sum(self.sizes.get(one.name, 0) for one in self.up) + self.sizes.get(found.name, 0) - self.limit
        if missing > 0:
            raise InsufficientMemory(f"model '{found.name}' doesn't fit", {"cpu": missing})
        built = served(found.name, version, found.config)
        self.up.append(built)
        return built

    async def retire(self, gone: ServedVersion) -> None:
        if self.busy is not None:
            await self.busy.wait()
        self.up.remove(gone)

    async def set_instances(self, changed: ServedVersion, config: ModelConfig) -> None:
        self.resized.append(changed.name)

    def bytes_of(self, name: str) -> Mapping[str, int]:
        return {"cpu": self.sizes.get(name, 0)}

    def check_ensemble(self, config: ModelConfig) -> None:
        for step in config.ensemble_scheduling.step:
            self.registry.find(step.model_name)
