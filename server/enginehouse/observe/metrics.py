"""All metrics of the server in one registry, read when somebody asks for them.

Models' series are made from the counts that ModelStatistics keeps; nothing here is on the way of a request.
Failures are remembered under their labels and so outlive a reload; all other series begin again with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import ProcessCollector
from prometheus_client.registry import CollectorRegistry

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import FailureReason
from enginehouse.observe import exposition
from enginehouse.observe.custom_metrics import CustomMetrics
from enginehouse.observe.latencies import FirstResponseHistogram, LatencySummaries
from enginehouse.observe.metrics_settings import MetricsSettings
from enginehouse.observe.model_families import (
    DEFAULT_FIRST_RESPONSE_BOUNDS_MS,
    FIRST_RESPONSE,
    ModelSeries,
    model_families,
    sorted_labels,
)
from enginehouse.observe.statistics import ModelStatistics, new_failure_counts
from enginehouse.observe.system_families import CpuReader, GpuReader
from enginehouse.types import MetricFamily

Provider = Callable[[], Iterable[MetricFamily]]
Source = Callable[[], Awaitable[Sequence[MetricFamily]]]


@dataclass(frozen=True, slots=True)
class CacheReading:
    """A response cache as it is now; durations are sums."""

    num_entries: int = 0
    num_lookups: int = 0
    num_hits: int = 0
    num_misses: int = 0
    num_evictions: int = 0
    lookup_us: int = 0
    insertion_us: int = 0
    utilization: float = 0.0


@dataclass(frozen=True, slots=True)
class Failures:
    """A version's failures by reason, and the labels of their series."""

    labels: Mapping[FailureReason, exposition.Labels]
    counts: dict[FailureReason, int]

    @classmethod
    def of(cls, labels: Mapping[str, str]) -> Failures:
        by_reason = {reason: sorted_labels({**labels, "reason": reason.value}) for reason in FailureReason}
        return cls(by_reason, new_failure_counts())


class Metrics:
    """See module. On the server's loop.

    `registry` takes any prometheus-client metric. `read_cache` is set by who owns the response cache,
    `read_pinned_bytes` by who owns the pool of pinned memory.
    """

    def __init__(self, settings: MetricsSettings) -> None:
        now_ns = time.monotonic_ns()
        interval_ns = int(settings.interval_ms * 1e6)
        self.settings = settings
        self.registry = CollectorRegistry(auto_describe=False)
        self.custom = CustomMetrics()
        self.read_cache: Callable[[], CacheReading] | None = None
        self.read_pinned_bytes: Callable[[], int] = lambda: 0
        self._models: dict[int, ModelSeries] = {}
        self._failures: dict[tuple[tuple[str, str], ...], Failures] = {}
        self._providers: list[Provider] = []
        self._sources: list[Source] = []
        self._cpu = CpuReader(interval_ns, now_ns) if settings.cpu else None
        self._gpu = GpuReader.open(interval_ns) if settings.gpu else None
        ProcessCollector(registry=self.registry)

    def open_model(
        self, config: ModelConfig, version: int, *, has_cache: bool = False, namespace: str = ""
    ) -> ModelStatistics:
        """Counts for a version that is about to serve. `has_cache`: its answers may come from a cache."""
        name = config.name.removeprefix(f"{namespace}::") if namespace else config.name
        labels = {"model": name, "version": str(version)}
        labels |= {f"_{key}": value for key, value in config.metric_tags.items()}
        if namespace:
            labels["namespace"] = namespace
        series_labels = sorted_labels(labels)
        now_ns = time.monotonic_ns()
        statistics = ModelStatistics(
            name,
            str(version),
            failures=self._failures.setdefault(tuple(series_labels.items()), Failures.of(series_labels)).counts,
            first_response=self._first_response(config),
            keep_responses=self.settings.response_statistics,
        )
        if self.settings.summary_latencies:
            quantiles = [quantile for quantile, _ in self.settings.quantiles]
            statistics.summaries = LatencySummaries(quantiles, now_ns, has_cache)
        self._models[id(statistics)] = ModelSeries(statistics, series_labels, has_cache, read_ns=now_ns)
        return statistics

    def watch(
        self,
        statistics: ModelStatistics,
        num_pending: Callable[[], int],
        num_instances: Callable[[], int] = lambda: 1,
    ) -> None:
        """Where to read the length of the version's queue and how many instances it has."""
        series = self._models[id(statistics)]
        series.num_pending, series.num_instances = num_pending, num_instances

    def close_model(self, statistics: ModelStatistics) -> None:
        """The version is gone and so are its series; its failures stay."""
        self._models.pop(id(statistics), None)
        self.custom.drop_owner(statistics.name, int(statistics.version))

    def add_provider(self, provider: Provider) -> None:
        """Families that are read at every scrape: memory, hosts, models."""
        self._providers.append(provider)

    def add_source(self, source: Source) -> Callable[[], None]:
        """Families that must be asked for, as an engine's in another process. Call the result to end it."""
        self._sources.append(source)
        return lambda: self._sources.remove(source)

    async def scrape(self) -> bytes:
        """The whole exposition."""
        families = await self.collect()
        # readings are made on the loop; writing a thousand models' would hold it for a tenth of a second
        return await asyncio.to_thread(exposition.write, families)

    async def collect(self) -> list[MetricFamily]:
        """All families with what the sources say."""
        return [*self.families(), *[family for source in list(self._sources) for family in await source()]]

    def models(self) -> list[ModelSeries]:
        """The versions that have series now. While a new build of a version is made and the old one finishes, the
        old one's: two series of the same labels can't be told apart."""
        by_labels: dict[tuple[tuple[str, str], ...], ModelSeries] = {}
        for series in self._models.values():
            by_labels.setdefault(tuple(series.labels.items()), series)
        return list(by_labels.values())

    def render(self) -> bytes:
        """The exposition without what the sources would say."""
        return exposition.write(self.families())

    def close(self) -> None:
        if self._gpu is not None:
            self._gpu.close()
            self._gpu = None

    def _first_response(self, config: ModelConfig) -> FirstResponseHistogram | None:
        if not (self.settings.histogram_latencies and config.model_transaction_policy.decoupled):
            return None
        bounds: Sequence[float] = DEFAULT_FIRST_RESPONSE_BOUNDS_MS
        for control in config.model_metrics.metric_control:
            if control.metric_identifier.family == FIRST_RESPONSE and control.histogram_options.buckets:
                bounds = list(control.histogram_options.buckets)
        return FirstResponseHistogram(bounds)

    def families(self) -> Iterator[MetricFamily]:
        """All families but those of the sources."""
        now_ns = time.monotonic_ns()
        failures = [(each.labels, each.counts) for each in self._failures.values()]
        yield from model_families(self.models(), failures, self.settings, now_ns)
        if self.read_cache is not None:
            yield from _cache_families(self.read_cache())
        yield _gauge(
            "nv_pinned_memory_pool_total_bytes",
            "Pinned memory pool total memory size, in bytes",
            self.settings.pinned_pool_bytes,
        )
        yield _gauge(
            "nv_pinned_memory_pool_used_bytes",
            "Pinned memory pool used memory size, in bytes",
            self.read_pinned_bytes(),
        )
        if self._cpu is not None:
            yield from self._cpu.families(now_ns)
        if self._gpu is not None:
            yield from self._gpu.families(now_ns)
        yield from self.custom.families()
        for provider in self._providers:
            yield from provider()
        yield from map(exposition.from_metric, self.registry.collect())


def _gauge(name: str, text: str, value: float, labels: Mapping[str, str] | None = None) -> MetricFamily:
    return MetricFamily(name, "gauge", text, [("", labels or {}, value)])


def _cache_families(cache: CacheReading) -> Iterator[MetricFamily]:
    yield _gauge("nv_cache_num_entries", "Number of responses stored in response cache", cache.num_entries)
    yield _gauge("nv_cache_num_lookups", "Number of cache lookups in response cache", cache.num_lookups)
    yield _gauge("nv_cache_num_hits", "Number of cache hits in response cache", cache.num_hits)
    yield _gauge("nv_cache_num_misses", "Number of cache misses in response cache", cache.num_misses)
    yield _gauge("nv_cache_num_evictions", "Number of cache evictions in response cache", cache.num_evictions)
    yield _gauge(
        "nv_cache_lookup_duration",
        "Total cache lookup duration (hit and miss), in microseconds",
        cache.lookup_us,
    )
    yield _gauge("nv_cache_insertion_duration", "Total cache insertion duration, in microseconds", cache.insertion_us)
    yield _gauge("nv_cache_util", "Cache utilization [0.0 - 1.0]", cache.utilization)
