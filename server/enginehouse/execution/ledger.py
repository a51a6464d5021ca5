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


class Booking:
    """What one load holds. A model that is loaded anew has two for a while: the old build's and the new one's."""

    def __init__(self, entries: Sequence[MemoryEntry]) -> None:
        self.entries = list(entries)


class Ledger:
    """One per server. Entries are booked before a load begins and measured once it is done."""

    def __init__(self, totals: Mapping[str, int], limits: Mapping[str, int] | None = None) -> None:
        self._totals = dict(totals)
        self._limits = {device: (limits or {}).get(device, 0) or total for device, total in totals.items()}
        self._bookings: list[Booking] = []

    def booked_bytes(self, device: str) -> int:
        return sum(entry.num_bytes for entry in self.entries(device=device))

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

    def book(self, wanted: Sequence[MemoryEntry]) -> Booking:
        """Raises InsufficientMemory with the numbers, and books nothing, if it doesn't fit."""
        self._check_room(wanted)
        booking = Booking(wanted)
        self._bookings.append(booking)
        return booking

    def extend(self, booking: Booking, wanted: Sequence[MemoryEntry]) -> None:
        """As `book`, for a load that needs more than it has booked."""
        self._check_room(wanted)
        booking.entries.extend(wanted)

    def give_back(self, booking: Booking, entry: MemoryEntry) -> None:
        """One that `extend` booked. Nothing happens if it was measured away since."""
        if entry in booking.entries:
            booking.entries.remove(entry)

    def replace(self, booking: Booking, entries: Sequence[MemoryEntry]) -> None:
        """What was measured takes the place of what was claimed; it is never refused."""
        booking.entries = list(entries)

    def release(self, booking: Booking) -> None:
        if booking in self._bookings:
            self._bookings.remove(booking)

    def _check_room(self, wanted: Sequence[MemoryEntry]) -> None:
        missing = self.missing_bytes(wanted)
        for device in missing:
            raise InsufficientMemory(self._refusal(device, wanted), missing)

    def entries(self, model: str = "", device: str = "") -> list[MemoryEntry]:
        return [
            entry
            for booking in self._bookings
            for entry in booking.entries
            if model in ("", entry.model) and device in ("", entry.device)
        ]

    def budgets(self) -> list[DeviceBudget]:
        return [
            DeviceBudget(device, total, self._limits[device], tuple(self.entries(device=device)))
            for device, total in self._totals.items()
        ]

    def _refusal(self, device: str, wanted: Sequence[MemoryEntry]) -> str:
        model = wanted[0].model
        needed = sum(entry.num_bytes for entry in wanted if entry.device == device)
        booked: dict[str, int] = {}
        for entry in self.entries(device=device):
            booked[entry.model] = booked.get(entry.model, 0) + entry.num_bytes
        holders = ", ".join(f"{name} {gib(count)}" for name, count in sorted(booked.items(), key=lambda x: -x[1])[:5])
        return (
            f"model '{model}' needs {gib(needed)} on {device}, {gib(max(self.free_bytes(device), 0))} of "
            f"{gib(self._limits.get(device, 0))} are free" + (f" (held by {holders})" if holders else "")
        )


def gib(num_bytes: int) -> str:
    """For people: 1.50 GiB, 12.3 MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.1f} MiB"
