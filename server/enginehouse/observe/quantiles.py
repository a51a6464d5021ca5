"""Quantiles of what happened in the last minute, in little memory and one dict update a value.

Values fall into buckets whose bounds grow by a constant factor, so a quantile is off by at most
RELATIVE_ERROR of itself (the DDSketch of Masson, Rim and Lee, 2019). The window slides by dropping the oldest
of a few sketches. No clock here: callers pass the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RELATIVE_ERROR = 0.005
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_SCALE = 1 / math.log(_GAMMA)
WINDOW_NS = 60_000_000_000
NUM_AGES = 5


class SlidingQuantiles:
    """`count` and `total` are of all time, quantiles of the last WINDOW_NS."""

    __slots__ = ("_ages", "_current", "_next_ns", "count", "quantiles", "total")

    def __init__(self, quantiles: Sequence[float], now_ns: int) -> None:
        self.quantiles = tuple(quantiles)
        self.count = 0
        self.total = 0.0
        self._ages: list[dict[int, int]] = [{}]
        self._current = self._ages[0]
        self._next_ns = now_ns + WINDOW_NS // NUM_AGES

    def observe(self, value: float, now_ns: int) -> None:
        """Values below 1 count as 1: the unit should be small."""
        if now_ns >= self._next_ns:
            self._advance(now_ns)
        self.count += 1
        self.total += value
        key = math.ceil(math.log(value) * _SCALE) if value > 1 else 0
        self._current[key] = self._current.get(key, 0) + 1

    def values(self, now_ns: int) -> list[float]:
        """One for each of `quantiles`; NaN if nothing was observed in the window."""
        self._advance(now_ns)
        merged: dict[int, int] = {}
        for age in self._ages:
            for key, number in age.items():
                merged[key] = merged.get(key, 0) + number
        keys = sorted(merged)
        size = sum(merged.values())
        return [
            _value_at(keys, merged, max(1, math.ceil(q * size))) if size else math.nan for q in self.quantiles
        ]

    def _advance(self, now_ns: int) -> None:
        step_ns = WINDOW_NS // NUM_AGES
        while now_ns >= self._next_ns:
            self._ages.append({})
            del self._ages[:-NUM_AGES]
            self._next_ns += step_ns
            if now_ns - self._next_ns > WINDOW_NS:
                self._ages = [{}]
                self._next_ns = now_ns + step_ns
        self._current = self._ages[-1]


def _value_at(keys: list[int], counts: dict[int, int], rank: int) -> float:
    seen = 0
    for key in keys:
        seen += counts[key]
        if seen >= rank:
            return 2 * _GAMMA**key / (_GAMMA + 1) if key else 1.0
    raise AssertionError("bug: the rank lies within the counts")
