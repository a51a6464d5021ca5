"""The registry as metrics read it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from enginehouse.observe.hosting_families import VersionReading
from enginehouse.repository.registry import Registry, VersionState


def version_readings(registry: Registry) -> Iterator[VersionReading]:
    """Every version that is loaded, ready or not."""
    for record in registry.models.values():
        for number, entry in record.versions.items():
            served = entry.served
            if served is None:
                continue
            is_ready = entry.state is VersionState.READY and served.healthy
            num_restarts = served.hosted.health.num_restarts if served.hosted is not None else 0
            yield VersionReading(record.name, number, is_ready, num_restarts)
