"""Metrics of where models run: bytes by the ledger, readiness, restarts of hosts.

The shapes below are execution's and the registry's, which lie above this layer; whoever composes the server
hands readings in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from enginehouse.types import MetricFamily


class Booking(Protocol):
    """execution.contract.MemoryEntry."""

    @property
    def model(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...


class Budget(Protocol):
    """execution.contract.DeviceBudget."""

    @property
    def device(self) -> str: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def limit_bytes(self) -> int: ...
    @property
    def entries(self) -> Sequence[Booking]: ...


@dataclass(frozen=True, slots=True)
class VersionReading:
    """One loaded version: whether it can be asked, and how often its hosts were started again."""

    model: str
    version: int
    is_ready: bool
    num_restarts: int
    load_s: float = 0.0


def memory_families(budgets: Iterable[Budget]) -> Iterator[MetricFamily]:
    """What each device has, what the ledger may hand out, and who holds how much of it for what."""
    read = list(budgets)
    yield MetricFamily(
        "enginehouse_memory_total_bytes",
        "gauge",
        "Memory of the device",
        [("", {"device": budget.device}, budget.total_bytes) for budget in read],
    )
    yield MetricFamily(
        "enginehouse_memory_limit_bytes",
        "gauge",
        "Memory of the device that models may use",
        [("", {"device": budget.device}, budget.limit_bytes) for budget in read],
    )
    booked: dict[tuple[str, str, int, str], int] = {}
    for budget in read:
        for entry in budget.entries:
            key = (budget.device, entry.model, entry.version, entry.kind)
            booked[key] = booked.get(key, 0) + entry.num_bytes
    yield MetricFamily(
        "enginehouse_memory_bytes",
        "gauge",
        "Memory that the ledger has booked for a model: weights, workspace or kv",
        [
            ("", {"device": device, "kind": kind, "model": model, "version": str(version)}, num_bytes)
            for (device, model, version, kind), num_bytes in booked.items()
        ],
    )


def version_families(versions: Iterable[VersionReading]) -> Iterator[MetricFamily]:
    read = list(versions)
    yield MetricFamily(
        "enginehouse_model_load_duration_seconds",
        "gauge",
        "Time that the version took to load",
        [("", _labels(each), each.load_s) for each in read if each.is_ready],
    )
    yield MetricFamily(
        "enginehouse_model_ready",
        "gauge",
        "Whether the version takes requests",
        [("", _labels(each), int(each.is_ready)) for each in read],
    )
    yield MetricFamily(
        "enginehouse_host_restarts",
        "counter",
        "Restarts of the version's hosts since it was loaded",
        [("_total", _labels(each), each.num_restarts) for each in read],
    )


@dataclass(frozen=True, slots=True)
class SharedProcessReading:
    """A process that models share, and the tensors that stay in it between them. Counts are since its start."""

    process: str
    num_kept: int
    num_fetched: int
    num_bytes_held: int


def shared_process_families(processes: Iterable[SharedProcessReading]) -> Iterator[MetricFamily]:
    read = list(processes)
    yield MetricFamily(
        "enginehouse_tensors_kept",
        "counter",
        "Tensors that stayed in the process from one model to the next",
        [("_total", {"process": each.process}, each.num_kept) for each in read],
    )
    yield MetricFamily(
        "enginehouse_tensors_fetched",
        "counter",
        "Tensors that had stayed and were copied to another process after all",
        [("_total", {"process": each.process}, each.num_fetched) for each in read],
    )
    yield MetricFamily(
        "enginehouse_tensors_held_bytes",
        "gauge",
        "Bytes of tensors that wait in the process for their next model",
        [("", {"process": each.process}, each.num_bytes_held) for each in read],
    )


def build_family(version: str) -> MetricFamily:
    return MetricFamily("enginehouse_build_info", "gauge", "The server's version", [("", {"version": version}, 1)])


def _labels(reading: VersionReading) -> Mapping[str, str]:
    return {"model": reading.model, "version": str(reading.version)}
