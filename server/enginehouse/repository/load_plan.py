"""What a load has to do, given what the repository says and what serves. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from enginehouse.config.schema import ModelConfig
from enginehouse.repository.definition import ModelDefinition


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load has to do. `resize`: only instance counts changed, so nothing is loaded anew."""

    build: Sequence[int]
    retire: Sequence[int]
    resize: bool = False


@dataclass(slots=True)
class Loaded:
    """What serves now, to tell whether a later definition differs."""

    definition: ModelDefinition
    versions: dict[int, str]
    explicit: bool
    load_s: float = 0.0
    """How long it took: what its return would cost."""


def plan_load(definition: ModelDefinition, current: Loaded | None, ready: Iterable[int]) -> LoadPlan:
    """Compares the definition with what serves. An empty plan means that nothing changed."""
    ready = set(ready)
    gone = sorted(ready - set(definition.versions))
    if current is None:
        return LoadPlan(list(definition.versions), gone)
    same_files = all(
        current.versions.get(version) == definition.fingerprints[version] for version in definition.versions
    )
    same_place = current.definition.place == definition.place
    if current.definition.config == definition.config and same_place:
        changed = [
            version
            for version in definition.versions
            if version not in ready or current.versions.get(version) != definition.fingerprints[version]
        ]
        return LoadPlan(changed, gone)
    unchanged = same_place and same_files and ready == set(definition.versions)
    if unchanged and _differs_in_counts_only(current.definition.config, definition.config):
        return LoadPlan((), (), resize=True)
    return LoadPlan(list(definition.versions), gone)


def _differs_in_counts_only(old: ModelConfig, new: ModelConfig) -> bool:
    copies = []
    for config in (old, new):
        copy = ModelConfig()
        copy.CopyFrom(config)
        copy.ClearField("instance_group")
        copies.append(copy)
    return copies[0] == copies[1] and not new.HasField("sequence_batching")
