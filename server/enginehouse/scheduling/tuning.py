"""Chooses the size and the delay of batches for a latency target, from what the model's batches take.

Pure: times come in as arguments. A request that just misses a batch waits for that one and then runs in its
own, so batches may take half of the target; the largest such size is the limit. If the instances can't keep up
with that, latency is made by the queue, and the size with the most throughput is the best for it. Waiting for
more requests is worth it only where batching saves time, the instances are busy, and the target leaves room.
What the model of costs gets wrong shows in the measured 99th percentile, which moves the share of the target
that is used.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import ClassVar

from enginehouse.scheduling.batch_cost import BatchCost
from enginehouse.scheduling.dynamic_batching import Cut, DynamicBatching, Wait
from enginehouse.scheduling.length_batching import LengthBatching
from enginehouse.scheduling.queue import RequestQueue

INTERVAL_NS = 250_000_000
"""Between two decisions."""
NUM_LATENCIES = 512
MIN_LATENCIES = 50
SATURATED = 0.9
"""Use of the instances above which the queue makes the latency."""
BUSY = 0.5
"""Below this use of the instances nobody needs to wait for company."""
WORTH_WAITING = 1.15
"""How many times the throughput a full batch must give for a delay to be worth it."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """A decision, and what it rests on."""

    max_rows: int
    delay_us: int
    p99_ms: float = 0.0
    """Measured; 0 while too few answers were given."""
    arrivals_per_s: float = 0.0
    overhead_ms: float = 0.0
    row_ms: float = 0.0
    """A batch of n rows takes overhead_ms + n * row_ms."""


@dataclass(slots=True)
class BatchTuner:
    """See module."""

    target_s: float
    max_rows: int
    max_delay_s: float
    num_instances: int = 1
    cost: BatchCost = field(default_factory=BatchCost)
    """Of rows."""
    share: float = 0.9
    """How much of the target is planned with."""
    _arrivals: deque[int] = field(default_factory=lambda: deque(maxlen=256))
    _latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_LATENCIES))
    _num_new_latencies: int = 0

    def arrived(self, now_ns: int) -> None:
        self._arrivals.append(now_ns)

    def answered(self, seconds: float) -> None:
        """A request took so long from its arrival to its final answer."""
        self._latencies_s.append(seconds)
        self._num_new_latencies += 1

    def decide(self, now_ns: int) -> Tuning:
        p99_s = self._p99_s()
        rate = self._arrivals_per_s(now_ns)
        rows = self._largest_rows()
        if self._use(rows, rate) > SATURATED:
            rows = self._fastest_rows(rows)
        else:
            self._adjust_share(p99_s)
        line = self.cost.line or (0.0, 0.0)
        return Tuning(
            rows,
            round(1e6 * self._delay_s(rows, rate)),
            1e3 * (p99_s or 0.0),
            rate,
            1e3 * line[0],
            1e3 * line[1],
        )

    def _adjust_share(self, p99_s: float | None) -> None:
        """Down quickly when the target is missed, up slowly when there is room."""
        if p99_s is None or self._num_new_latencies < MIN_LATENCIES:
            return
        self._num_new_latencies = 0
        if p99_s > self.target_s:
            self.share = max(0.2, self.share * 0.85)
        elif p99_s < 0.8 * self.target_s:
            self.share = min(1.2, self.share * 1.03)

    def _largest_rows(self) -> int:
        """Of which two batches fit into the planned share of the target."""
        rows = 1
        while rows < self.max_rows:
            seconds = self.cost.seconds(rows + 1)
            if seconds is None or 2 * seconds > self.target_s * self.share:
                break
            rows += 1
        return self.max_rows if self.cost.seconds(1) is None else rows

    def _use(self, rows: int, rate: float) -> float:
        """Of the instances' time, if all batches have that size."""
        return rate * (self.cost.seconds(rows) or 0.0) / rows / self.num_instances

    def _fastest_rows(self, least: int) -> int:
        """The smallest size from `least` on with nearly the most rows a second."""
        rates = {rows: rows / (self.cost.seconds(rows) or 1.0) for rows in range(least, self.max_rows + 1)}
        most = max(rates.values())
        return next(rows for rows, rate in rates.items() if rate >= 0.97 * most)

    def _delay_s(self, rows: int, rate: float) -> float:
        alone_s, full_s = self.cost.seconds(1), self.cost.seconds(rows)
        if alone_s is None or full_s is None or rows == 1 or not rate:
            return 0.0
        gain = rows * alone_s / full_s if full_s else 0.0
        if self._use(1, rate) < BUSY or gain < WORTH_WAITING:
            return 0.0
        room_s = self.target_s * self.share - 2 * full_s
        delay_s = min((rows - 1) / rate, room_s, self.max_delay_s)
        return delay_s if delay_s * rate >= 1 else 0.0

    def _arrivals_per_s(self, now_ns: int) -> float:
        if len(self._arrivals) < 2:
            return 0.0
        elapsed_ns = now_ns - self._arrivals[0]
        return 1e9 * (len(self._arrivals) - 1) / elapsed_ns if elapsed_ns > 0 else 0.0

    def _p99_s(self) -> float | None:
        if len(self._latencies_s) < MIN_LATENCIES:
            return None
        ordered = sorted(self._latencies_s)
        return ordered[int(0.99 * len(ordered))]


@dataclass(slots=True)
class TunedBatching:
    """A policy whose size and delay the tuner sets anew every quarter of a second."""

    learns: ClassVar[bool] = True
    inner: DynamicBatching | LengthBatching
    tuner: BatchTuner
    tuning: Tuning = Tuning(0, 0)
    _next_ns: int = 0

    def decide(self, queue: RequestQueue, now_ns: int) -> Cut | Wait | None:
        if now_ns >= self._next_ns:
            self._next_ns = now_ns + INTERVAL_NS
            self._tune(now_ns)
        return self.inner.decide(queue, now_ns)

    def learn(self, cut: Cut, seconds: float) -> None:
        self.tuner.cost.learn(sum(ticket.rows for ticket in cut.tickets), seconds)
        self.inner.learn(cut, seconds)

    def _tune(self, now_ns: int) -> None:
        self.tuning = self.tuner.decide(now_ns)
        plain = self.inner.plain if isinstance(self.inner, LengthBatching) else self.inner
        tuned = replace(
            plain,
            max_rows=self.tuning.max_rows,
            preferred_rows=frozenset(),
            delay_ns=1000 * self.tuning.delay_us,
        )
        if isinstance(self.inner, LengthBatching):
            self.inner.plain = tuned
        else:
            self.inner = tuned
