"""The bytes of every device by model: what is booked, and whether more fits. Pure; on the loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from enginehouse.errors import ResourceExhausted
from enginehouse.execution.contract import DeviceBudget, MemoryEntry

GIB = 1 << 30


class InsufficientMemory(ResourceExhausted):
    """A load that doesn't fit. `missing`: bytes by device that would have to come free."""

    def __init__(self, message: str, missing: Mapping[str, int]) -> None:
        super().__init__(message)
        self.missing = missing


class Ledger:
    """One per server. Entries are booked before a load begins and measured once it is done."""

    def __init__(self, totals: Mapping[str, int], limits: Mapping[str, int] | None = None) -> None:
        self._totals = dict(totals)
        self._limits = {device: (limits or {}).get(device, 0) or total for device, total in totals.items()}
        self._entries: list[MemoryEntry] = []

    def booked_bytes(self, device: str) -> int:
        return sum(entry.num_bytes for entry in self._entries if entry.device == device)

    def limit_bytes(self, device: str) -> int:
        return self._limits.get(device, 0)

    def free_bytes(self, device: str) -> int:
        return self._limits.get(device, 0) - self.booked_bytes(device)

    def missing_bytes(self, wanted: Iterable[MemoryEntry]) -> dict[str, int]:
        """By device, how much more than there is; empty if all of it fits."""
        needed: dict[str, int] = {}
        for entry in wanted:
            needed[entry.device] = needed.get(entry.device, 0) + entry.num_bytes
        missing = {device: count - self.free_bytes(device) for device, count in needed.items()}
        return {device: count for device, count in missing.items() if count > 0 and needed[device] > 0}

    def book(self, wanted: Sequence[MemoryEntry]) -> None:
        """Raises InsufficientMemory with the numbers, and books nothing, if it doesn't fit."""
        missing = self.missing_bytes(wanted)
        for device in missing:
            raise InsufficientMemory(self._refusal(device, wanted), missing)
        self._entries.extend(wanted)

    def replace(self, model: str, version: int, entries: Sequence[MemoryEntry]) -> None:
        """What was measured takes the place of what was claimed; it is never refused."""
        self.release(model, version)
        self._entries.extend(entries)

    def release(self, model: str, version: int) -> int:
        """Forgets the version's entries; the bytes that were booked."""
        gone = sum(e.num_bytes for e in self._entries if (e.model, e.version) == (model, version))
        self._entries = [e for e in self._entries if (e.model, e.version) != (model, version)]
        return gone

    def entries(self, model: str = "", device: str = "") -> list[MemoryEntry]:
        return [e for e in self._entries if model in ("", e.model) and device in ("", e.device)]

    def budgets(self) -> list[DeviceBudget]:
        return [
            DeviceBudget(device, total, self._limits[device], tuple(self.entries(device=device)))
            for device, total in self._totals.items()
        ]

    def _refusal(self, device: str, wanted: Sequence[MemoryEntry]) -> str:
        model = wanted[0].model
        needed = sum(entry.num_bytes for entry in wanted if entry.device == device)
        booked: dict[str, int] = {}
        for entry in self._entries:
            if entry.device == device:
                booked[entry.model] = booked.get(entry.model, 0) + entry.num_bytes
        holders = ", ".join(f"{name} {gib(count)}" for name, count in sorted(booked.items(), key=lambda x: -x[1])[:5])
        return (
            f"model '{model}' needs {gib(needed)} on {device}, {gib(max(self.free_bytes(device), 0))} of "
            f"{gib(self._limits.get(device, 0))} are free" + (f" (held by {holders})" if holders else "")
        )


def gib(num_bytes: int) -> str:
    """For people: 1.50 GiB, 12.3 MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.1f} MiB"
