"""The registry and the hosts as metrics read them. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from enginehouse.execution.held import HeldTensors
from enginehouse.execution.hosts import ModelHosts
from enginehouse.observe.hosting_families import SharedProcessReading, VersionReading
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
            yield VersionReading(record.name, number, is_ready, num_restarts, served.load_s)


def shared_process_readings(hosts: ModelHosts) -> Iterator[SharedProcessReading]:
    """Of the processes that models share and that run; those with different interpreters have one name."""
    by_name: dict[str, list[HeldTensors]] = {}
    for process in hosts.shared_processes:
        if process.worker is not None:
            by_name.setdefault(process.name, []).append(process.worker.held)
    for name, held in by_name.items():
        yield SharedProcessReading(
            name,
            sum(each.num_kept for each in held),
            sum(each.num_fetched for each in held),
            sum(each.num_bytes_held for each in held),
        )
