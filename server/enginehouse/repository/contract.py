"""What the lifecycle needs of those around it: where definitions come from, and who makes versions ready."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from enginehouse.config.schema import ModelConfig
from enginehouse.execution.contract import Remains
from enginehouse.repository.definition import ModelDefinition, Override
from enginehouse.repository.registry import ServedVersion


class ModelSource(Protocol):
    """Where definitions come from. Blocking: called in a thread."""

    def names(self) -> list[str]:
        """Models that the repositories hold now."""
        ...

    def poll(self, name: str, override: Override | None) -> ModelDefinition:
        """Raises PollError for a model that can't be found or read."""
        ...

    def loaded(self, definition: ModelDefinition) -> None:
        """The load succeeded: the override that it came with, if any, stays for polls without one."""
        ...

    def forget_override(self, name: str) -> None:
        """The next poll without an override reads the model's own config again."""
        ...


class VersionBuilder(Protocol):
    """Makes a version ready and takes it down again."""

    async def build(self, definition: ModelDefinition, version: int) -> ServedVersion: ...
    async def retire(self, served: ServedVersion) -> Remains | None:
        """Waits for what is in flight as long as something comes back, then gives everything back."""
        ...

    async def set_instances(self, served: ServedVersion, config: ModelConfig) -> None: ...
    def check_ensemble(self, config: ModelConfig) -> None:
        """Raises InvalidArgument for steps that don't fit the loaded members."""
        ...

    def bytes_of(self, name: str) -> Mapping[str, int]:
        """What the model holds, by device."""
        ...
