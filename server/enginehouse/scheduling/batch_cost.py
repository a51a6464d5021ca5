"""How long a batch takes as a function of its size, learned from those that ran. Pure.

A line, seconds = overhead + per_unit * size, fitted by least squares. What disturbs a batch is about proportional
to its time, so each counts by the square of one over its size; and older ones count for less. Size is whatever
the policy pays for: rows, or tokens with their padding.
"""

from __future__ import annotations

from dataclasses import dataclass

FORGET = 0.99
"""What a batch still counts for after the next one."""
MIN_BATCHES = 8.0
"""Below so many batches (old ones count for less) nothing is known."""


@dataclass(slots=True)
class BatchCost:
    """See module."""

    num_batches: float = 0.0
    _weight: float = 0.0
    _size: float = 0.0
    _seconds: float = 0.0
    _size_seconds: float = 0.0

    def learn(self, size: int, seconds: float) -> None:
        size = max(size, 1)
        weight = 1 / (size * size)
        self.num_batches = self.num_batches * FORGET + 1  # is also the weighted sum of the squares of sizes
        self._weight = self._weight * FORGET + weight
        self._size = self._size * FORGET + weight * size
        self._seconds = self._seconds * FORGET + weight * seconds
        self._size_seconds = self._size_seconds * FORGET + weight * size * seconds

    @property
    def line(self) -> tuple[float, float] | None:
        """(overhead seconds, seconds per unit); None while too little is known, or only one size was seen."""
        if self.num_batches < MIN_BATCHES:
            return None
        mean_size, mean_seconds = self._means()
        variance = self.num_batches / self._weight - mean_size**2
        if variance <= 1e-4 * mean_size**2:
            return None
        slope = (self._size_seconds / self._weight - mean_size * mean_seconds) / variance
        slope = min(max(slope, 0.0), mean_seconds / mean_size)  # a line through the origin at most
        return mean_seconds - slope * mean_size, slope

    def seconds(self, size: float) -> float | None:
        """What a batch of this size should take. With one size seen, that much for any size up to it."""
        if self.num_batches < MIN_BATCHES:
            return None
        line = self.line
        if line is None:
            mean_size, mean_seconds = self._means()
            return mean_seconds * max(1.0, size / mean_size)
        return line[0] + line[1] * size

    def overhead(self, default: float) -> float:
        """What a batch costs besides its size, in units of size."""
        line = self.line
        if line is None:
            return default
        return min(line[0] / line[1], 1e6) if line[1] > 0 else 1e6

    def _means(self) -> tuple[float, float]:
        return self._size / self._weight, self._seconds / self._weight
