"""How long requests took, as distributions: histograms that cost one addition, and optional summaries."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from enginehouse.observe.quantiles import SlidingQuantiles

NUM_BINS = 64


class LatencyHistogram:
    """Counts by power of two: bin n holds durations below 2**n microseconds and not below 2**(n-1).

    Hot code adds to `bins[(ns // 1000).bit_length()]` itself.
    """

    __slots__ = ("bins",)

    def __init__(self) -> None:
        self.bins = [0] * NUM_BINS

    def observe_ns(self, ns: int) -> None:
        self.bins[(ns // 1000).bit_length()] += 1

    def cumulative(self, first: int = 6, last: int = 26) -> list[tuple[float, int]]:
        """(upper bound in seconds, count up to it), from 64 us to 67 s by default; infinity last."""
        pairs: list[tuple[float, int]] = []
        count = sum(self.bins[:first])
        for power in range(first, last + 1):
            count += self.bins[power]
            pairs.append((2**power / 1e6, count))
        return [*pairs, (float("inf"), sum(self.bins))]


class FirstResponseHistogram:
    """Milliseconds from a request to its first answer, in buckets that config may choose."""

    __slots__ = ("bounds_ms", "counts", "total_ms")

    def __init__(self, bounds_ms: Sequence[float]) -> None:
        self.bounds_ms = tuple(sorted(bounds_ms))
        self.counts = [0] * (len(self.bounds_ms) + 1)
        self.total_ms = 0

    def observe_ns(self, ns: int) -> None:
        ms = ns // 1_000_000
        self.counts[bisect_left(self.bounds_ms, ms)] += 1
        self.total_ms += ms


class LatencySummaries:
    """Quantiles of each phase in microseconds. With a response cache there is none of whole requests:
    a hit's cost and a miss's are not to be mixed."""

    __slots__ = ("by_phase",)

    def __init__(self, quantiles: Sequence[float], now_ns: int, with_cache: bool) -> None:
        phases = ["queue", "compute_input", "compute_infer", "compute_output"]
        phases += ["cache_hit", "cache_miss"] if with_cache else ["request"]
        self.by_phase = {phase: SlidingQuantiles(quantiles, now_ns) for phase in phases}

    def observe(
        self, now_ns: int, request_ns: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int
    ) -> None:
        phases = self.by_phase
        if "request" in phases:
            phases["request"].observe(request_ns // 1000, now_ns)
        phases["queue"].observe(queue_ns // 1000, now_ns)
        phases["compute_input"].observe(input_ns // 1000, now_ns)
        phases["compute_infer"].observe(infer_ns // 1000, now_ns)
        phases["compute_output"].observe(output_ns // 1000, now_ns)

    def observe_cache_hit(self, now_ns: int, queue_ns: int, lookup_ns: int) -> None:
        self.by_phase["queue"].observe(queue_ns // 1000, now_ns)
        if "cache_hit" in self.by_phase:
            self.by_phase["cache_hit"].observe(lookup_ns // 1000, now_ns)

    def observe_cache_miss(self, now_ns: int, cost_ns: int) -> None:
        if "cache_miss" in self.by_phase:
            self.by_phase["cache_miss"].observe(cost_ns // 1000, now_ns)
