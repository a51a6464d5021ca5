"""The loaded models as execution's residency policy sees them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from enginehouse.config.schema import ModelServing
from enginehouse.execution.residency import Residency, Resident
from enginehouse.repository.load_plan import Loaded
from enginehouse.repository.registry import Registry, ServedVersion

_RESIDENCY = {
    ModelServing.RESIDENCY_AUTO: Residency.AUTO,
    ModelServing.RESIDENCY_PINNED: Residency.PINNED,
    ModelServing.RESIDENCY_TTL: Residency.TTL,
}


def residents(
    loaded: Mapping[str, Loaded], registry: Registry, bytes_of: Callable[[str], Mapping[str, int]], now_ns: int
) -> list[Resident]:
    """Ensembles are none: they hold no memory of their own."""
    found = []
    for name, one in loaded.items():
        ready = registry.ready_versions(name)
        if not ready or one.definition.config.HasField("ensemble_scheduling"):
            continue
        serving = one.definition.config.serving
        found.append(
            Resident(
                name,
                _RESIDENCY[serving.residency],
                bytes_of(name),
                (now_ns - max(served.last_used_ns for served in ready)) / 1e9,
                one.load_s,
                any(_is_busy(served) for served in ready),
                serving.idle_unload_s,
            )
        )
    return found


def _is_busy(served: ServedVersion) -> bool:
    """A sequence between two requests keeps its model too: what it knows would be lost."""
    scheduler = served.scheduler
    return scheduler is not None and bool(scheduler.num_in_flight or scheduler.num_sequences)
