"""How long a batch takes as a function of its size, learned from those that ran. Pure.

A line, seconds = overhead + per_unit * size, fitted by least squares in which older batches count for less.
Size is whatever the policy pays for: rows, or tokens with their padding.
"""

from __future__ import annotations

from dataclasses import dataclass

FORGET = 0.98
"""What a batch still counts for after the next one."""
MIN_WEIGHT = 8.0
"""Below so many batches (old ones count for less) nothing is known."""


@dataclass(slots=True)
class BatchCost:
    """See module."""

    weight: float = 0.0
    _size: float = 0.0
    _seconds: float = 0.0
    _size_size: float = 0.0
    _size_seconds: float = 0.0

    def learn(self, size: int, seconds: float) -> None:
        self.weight = self.weight * FORGET + 1
        self._size = self._size * FORGET + size
        self._seconds = self._seconds * FORGET + seconds
        self._size_size = self._size_size * FORGET + size * size
        self._size_seconds = self._size_seconds * FORGET + size * seconds

    @property
    def line(self) -> tuple[float, float] | None:
        """(overhead seconds, seconds per unit); None while too little is known, or only one size was seen."""
        if self.weight < MIN_WEIGHT:
            return None
        mean_size, mean_seconds = self._size / self.weight, self._seconds / self.weight
        variance = self._size_size / self.weight - mean_size**2
        if variance <= 1e-4 * mean_size**2:
            return None
        slope = (self._size_seconds / self.weight - mean_size * mean_seconds) / variance
        slope = min(max(slope, 0.0), mean_seconds / mean_size)  # a line through the origin at most
        return mean_seconds - slope * mean_size, slope

    def seconds(self, size: float) -> float | None:
        """What a batch of this size should take. With one size seen, that much for any size up to it."""
        if self.weight < MIN_WEIGHT:
            return None
        line = self.line
        if line is None:
            mean_size, mean_seconds = self._size / self.weight, self._seconds / self.weight
            return mean_seconds * max(1.0, size / mean_size)
        return line[0] + line[1] * size

    def overhead(self, default: float) -> float:
        """What a batch costs besides its size, in units of size."""
        line = self.line
        if line is None:
            return default
        return min(line[0] / line[1], 1e6) if line[1] > 0 else 1e6
