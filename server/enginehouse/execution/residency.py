"""Who leaves when memory is short or nobody asks any more. Pure: residents and the time in, names out.

Least recently used, weighed by what it costs to come back: a model that loads in 50 ms goes before one that
loads in 30 s and has been idle somewhat longer (the idea of GreedyDual-Size, Cao and Irani 1997).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

MIN_RELOAD_S = 0.01


class Residency(Enum):
    AUTO = "auto"
    """May be unloaded whenever its memory is needed."""
    PINNED = "pinned"
    """Stays until somebody unloads it."""
    TTL = "ttl"
    """Stays for its idle time, whatever the pressure; then it goes."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded model. Times in seconds; `bytes_by_device` is what unloading gives back."""

    name: str
    residency: Residency
    bytes_by_device: Mapping[str, int]
    idle_s: float
    reload_s: float
    is_busy: bool
    idle_unload_s: float = 0.0
    """Unload after so long without a request; 0 is never."""

    @property
    def has_outstayed(self) -> bool:
        return self.idle_unload_s > 0 and self.idle_s >= self.idle_unload_s

    @property
    def is_evictable(self) -> bool:
        if self.residency is Residency.PINNED:
            return False
        return self.residency is Residency.AUTO or self.has_outstayed

    @property
    def eagerness(self) -> float:
        """The higher, the sooner it goes: seconds idle for each second that its return costs."""
        return self.idle_s / max(self.reload_s, MIN_RELOAD_S)


def choose_victims(residents: Iterable[Resident], missing: Mapping[str, int]) -> Sequence[str]:
    """The models to unload so that `missing` bytes by device come free; none if that can't be reached.

    Idle ones go first; busy ones finish what they have before they go.
    """
    candidates = sorted(
        (resident for resident in residents if resident.is_evictable),
        key=lambda resident: (resident.is_busy, -resident.eagerness, resident.name),
    )
    needed = dict(missing)
    chosen: list[Resident] = []
    for resident in candidates:
        if not any(needed.get(device, 0) > 0 for device in resident.bytes_by_device):
            continue
        chosen.append(resident)
        for device, count in resident.bytes_by_device.items():
            needed[device] = needed.get(device, 0) - count
        if all(count <= 0 for count in needed.values()):
            return [resident.name for resident in _without_spare(chosen, needed)]
    return []


def _without_spare(chosen: Sequence[Resident], surplus: Mapping[str, int]) -> Sequence[Resident]:
    """Keeps whoever need not go after all: small ones chosen before a big one that alone was enough."""
    left = {device: -count for device, count in surplus.items()}
    kept = list(chosen)
    for resident in list(reversed(chosen)):
        if all(left.get(device, 0) >= count for device, count in resident.bytes_by_device.items()):
            kept.remove(resident)
            for device, count in resident.bytes_by_device.items():
                left[device] = left.get(device, 0) - count
    return kept


def outstayed(residents: Iterable[Resident]) -> Sequence[str]:
    """Those whose idle time is over and that have nothing to do."""
    return [
        resident.name
        for resident in residents
        if resident.has_outstayed and not resident.is_busy and resident.residency is not Residency.PINNED
    ]
