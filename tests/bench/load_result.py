"""What a load client counts, and how it tells."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Of the measured stretch alone. `started_s` and `ended_s` are time.time()."""

    started_s: float
    ended_s: float
    num_good: int
    num_bad: int
    num_lost: int
    p50_ms: float
    p99_ms: float
    client_cpu_s: float

    @property
    def requests_per_second(self) -> float:
        return self.num_good / (self.ended_s - self.started_s)


class Tally:
    """Latencies while it `counts`; connections go on while it `is_going`."""

    def __init__(self) -> None:
        self.is_going = True
        self.counts = False
        self._latencies_ns: list[int] = []
        self._num_bad = 0
        self._num_lost = 0
        self._started_s = 0.0
        self._cpu_s = 0.0

    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def count(self, sent_ns: int, is_good: bool) -> None:
        if not self.counts:
            return
        if is_good:
            self._latencies_ns.append(self.now_ns() - sent_ns)
        else:
            self._num_bad += 1

    def lose(self) -> None:
        self._num_lost += 1

    def start(self) -> None:
        self.counts, self._started_s, self._cpu_s = True, time.time(), time.process_time()

    def end(self) -> LoadResult:
        self.counts = self.is_going = False
        ended_s = time.time()
        ordered = sorted(self._latencies_ns)

        def quantile_ms(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1e6 if ordered else 0.0

        return LoadResult(
            self._started_s,
            ended_s,
            len(ordered),
            self._num_bad,
            self._num_lost,
            quantile_ms(0.5),
            quantile_ms(0.99),
            time.process_time() - self._cpu_s,
        )
