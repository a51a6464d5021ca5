"""Which versions exist, in what state, and which one a request means. No I/O, clock or tasks here.

The texts are Triton's, to the letter: clients match them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument, NotFound, Unavailable
from enginehouse.repository.definition import plain_name
from enginehouse.types import TensorSpec

LATEST = -1
_INT64_MAX = 2**63 - 1
_LEADING_INTEGER = re.compile(r"\s*([+-]?\d+)")


class VersionState(StrEnum):
    UNKNOWN = ""
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


DUPLICATE = "model appears in two or more repositories"
UNLOADED = "unloaded"
"""The reason of a version that was asked to go."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A line of the repository index. `version` is "" while no version was ever tried."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


@dataclass(slots=True, eq=False)
class ServedVersion:
    """A version that can be asked. Front ends read it; core and lifecycle own it."""

    name: str
    version: int
    config: ModelConfig
    inputs: Mapping[str, TensorSpec]
    """With the batch axis (-1 first) where the model batches; control inputs are not among them."""
    outputs: Mapping[str, TensorSpec]
    ready_versions: Sequence[str] = ()
    """All ready versions of this model, ascending: what metadata lists. Kept by the registry."""
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By output: lines of its label file, for the classification extension."""
    decoupled: bool = False
    generative: bool = False
    scheduler: Any = None
    """scheduling.contract.Scheduler."""
    hosted: Any = None
    """execution.contract.HostedModel; None for an ensemble."""
    statistics: Any = None
    """observe.statistics: this version's."""
    checks: Any = None
    """request_checks.RequestChecks of the config."""
    reshapes_outputs: bool = False
    load_s: float = 0.0
    """How long it took to become ready."""
    last_used_ns: int = 0
    """CLOCK_MONOTONIC of the last request: what idle unloading and eviction go by."""
    healthy: bool = True
    """False while the host is down: the version is known, not ready, and refuses requests."""
    keeper: Any = None
    """Keeps the folder that it was loaded from."""

    @property
    def key(self) -> str:
        """What the registry has it under: the name, with its namespace where there are namespaces."""
        return self.config.name or self.name


@dataclass(slots=True)
class VersionRecord:
    state: VersionState = VersionState.UNKNOWN
    reason: str = ""
    served: ServedVersion | None = None


@dataclass(slots=True)
class ModelRecord:
    """A model that a load was tried for. It stays when its versions are gone."""

    name: str
    versions: dict[int, VersionRecord] = field(default_factory=dict)
    default: ServedVersion | None = None
    """The highest ready version."""
    on_demand: bool = False
    """Listed, and loaded by its first request."""
    last_config: ModelConfig | None = None
    """Of the version that was ready last: what ensembles know of a member that was evicted."""


class Registry:
    """The one owner of version states. Everything else asks it or tells it."""

    def __init__(self, *, has_namespaces: bool = False) -> None:
        self.models: dict[str, ModelRecord] = {}
        self.has_namespaces = has_namespaces

    # --- lookups

    def find(self, name: str, version: str = "") -> ServedVersion:
        """The version that a request means. Raises NotFound, Unavailable or InvalidArgument."""
        if version == "":
            record = self.models.get(name)
            if record is not None and record.default is not None:
                return record.default
        return self._find_number(self.resolve(name), parse_version(version))

    def resolve(self, name: str) -> str:
        """What a name without namespace means: itself, or the only model of that name in a namespace.

        Raises InvalidArgument if it could be several.
        """
        if not self.has_namespaces or name in self.models:
            return name
        meant = [key for key in self.models if plain_name(key) == name]
        live = [key for key in meant if self.models[key].default is not None or self.models[key].on_demand] or meant
        if len(live) > 1:
            raise InvalidArgument(
                f"There are {len(live)} identifiers of model '{name}' in global map, model namespace must be "
                "provided to resolve ambiguity."
            )
        return live[0] if live else name

    def _find_number(self, name: str, number: int) -> ServedVersion:
        record = self.models.get(name)
        if record is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if number == LATEST:
            if record.default is None:
                raise NotFound(f"Request for unknown model: '{name}' has no available versions")
            return record.default
        entry = record.versions.get(number)
        if entry is None:
            raise NotFound(f"Request for unknown model: '{name}' version {number} is not found")
        if entry.state is not VersionState.READY or entry.served is None:
            raise Unavailable(f"Request for unknown model: '{name}' version {number} is not at ready state")
        return entry.served

    def why_unready(self, name: str) -> str:
        """Why no version of it can be asked: what loading the newest one failed with, or what it is busy with.

        "" if one is ready, or if no load was tried.
        """
        record = self.models.get(self.resolve(name))
        if record is None or record.default is not None or not record.versions:
            return ""
        entry = record.versions[max(record.versions)]
        return entry.reason or entry.state.value.lower()

    def is_ready(self, name: str, version: str = "") -> bool:
        number = parse_version(version)
        record = self.models.get(self.resolve(name))
        if record is None:
            return False
        if number == LATEST:
            return record.default is not None and record.default.healthy
        entry = record.versions.get(number)
        return (
            entry is not None
            and entry.state is VersionState.READY
            and entry.served is not None
            and entry.served.healthy
        )

    def ready_versions(self, name: str) -> list[ServedVersion]:
        record = self.models.get(self.resolve(name))
        return [] if record is None else _ready(record)

    def given_up(self, name: str) -> list[ServedVersion]:
        """Versions that failed for good while they served, and are still known for that."""
        record = self.models.get(self.resolve(name))
        entries = record.versions.values() if record is not None else ()
        return [
            entry.served for entry in entries if entry.state is VersionState.UNAVAILABLE and entry.served is not None
        ]

    def all_ready(self) -> Iterator[ServedVersion]:
        for name in sorted(self.models):
            yield from _ready(self.models[name])

    def all_settled_ready(self) -> bool:
        """Strict readiness: whatever was to be loaded is ready. Models unloaded on purpose don't count."""
        return all(
            (entry.state is VersionState.READY and entry.served is not None and entry.served.healthy)
            or (entry.state is VersionState.UNAVAILABLE and entry.reason.partition(";")[0] == UNLOADED)
            for record in self.models.values()
            if not record.on_demand
            for entry in record.versions.values()
        )

    def index(self, names: Sequence[str], ready_only: bool = False) -> list[IndexEntry]:
        """`names` are those that the repositories hold now."""
        entries: list[IndexEntry] = []
        for name in names:
            record = self.models.get(name)
            shown = plain_name(name) if self.has_namespaces else name
            if record is None:
                if not ready_only:
                    entries.append(IndexEntry(shown))
                continue
            if record.on_demand and not record.versions and not ready_only:
                entries.append(IndexEntry(shown, reason="on demand: loaded by its first request"))
            for number, entry in sorted(record.versions.items()):
                state, reason = _as_it_is(entry)
                if not ready_only or state is VersionState.READY:
                    entries.append(IndexEntry(shown, str(number), state.value, reason))
        return entries

    # --- changes

    def record(self, name: str) -> ModelRecord:
        """The model's record, made if there is none."""
        return self.models.setdefault(name, ModelRecord(name))

    def set_state(
        self, name: str, number: int, state: VersionState, reason: str = "", served: ServedVersion | None = None
    ) -> None:
        record = self.record(name)
        entry = record.versions.setdefault(number, VersionRecord())
        entry.state, entry.reason = state, reason
        if state in (VersionState.READY, VersionState.UNAVAILABLE) or served is not None:
            entry.served = served
        self._refresh(record)

    def forget_version(self, name: str, number: int) -> None:
        record = self.record(name)
        record.versions.pop(number, None)
        self._refresh(record)

    @staticmethod
    def _refresh(record: ModelRecord) -> None:
        ready = _ready(record)
        record.default = ready[-1] if ready else None
        if ready:
            record.last_config = ready[-1].config
        names = [str(served.version) for served in ready]
        for served in ready:
            served.ready_versions = names


def _as_it_is(entry: VersionRecord) -> tuple[VersionState, str]:
    """A version that serves is not ready while its host is down: it refuses requests until it is back."""
    if entry.state is VersionState.READY and entry.served is not None and not entry.served.healthy:
        reason = entry.served.hosted.health.reason if entry.served.hosted is not None else ""
        return VersionState.UNAVAILABLE, f"restarting: {reason}"
    return entry.state, entry.reason


def _ready(record: ModelRecord) -> list[ServedVersion]:
    return [
        entry.served
        for _, entry in sorted(record.versions.items())
        if entry.state is VersionState.READY and entry.served is not None
    ]


def parse_version(text: str) -> int:
    """LATEST for "", else the number. Raises InvalidArgument as std::stol would refuse it."""
    if text == "":
        return LATEST
    found = _LEADING_INTEGER.match(text)
    if found is None or not -_INT64_MAX <= int(found.group(1)) <= _INT64_MAX:
        raise InvalidArgument(
            f"failed to get model version from specified version string '{text}' (details: stol), version "
            "should be an integral value > 0"
        )
    number = int(found.group(1))
    if number < 0:
        raise InvalidArgument(
            f"invalid model version specified '{text}' , version should be an integral value > 0"
        )
    return number
