"""The families of metrics that describe models: their names, help texts and how they are read off the counts.

The nv_* ones are Triton's to the letter, since dashboards and alerts are built on them. Ours begin with
enginehouse_.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from enginehouse.errors import FailureReason
from enginehouse.observe.exposition import Labels
from enginehouse.observe.latencies import LatencyHistogram
from enginehouse.observe.metrics_settings import MetricsSettings
from enginehouse.observe.statistics import ModelStatistics
from enginehouse.types import MetricFamily

Sample = tuple[str, Mapping[str, str], float]

FIRST_RESPONSE = "nv_inference_first_response_histogram_ms"
DEFAULT_FIRST_RESPONSE_BOUNDS_MS = (100.0, 500.0, 2000.0, 5000.0)


@dataclass(slots=True)
class ModelSeries:
    """One version in the exposition. The last three are for reading how busy it was since last time."""

    statistics: ModelStatistics
    labels: Labels
    has_cache: bool
    num_pending: Callable[[], int] = lambda: 0
    num_instances: Callable[[], int] = lambda: 0
    read_ns: int = 0
    read_busy_ns: int = 0
    saturation: float = 0.0


@dataclass(frozen=True, slots=True)
class CounterSpec:
    name: str
    help: str
    read: Callable[[ModelStatistics], int] = field(repr=False)


COUNTERS = (
    CounterSpec(
        "nv_inference_request_success",
        "Number of successful inference requests, all batch sizes",
        lambda s: s.success,
    ),
    CounterSpec(
        "nv_inference_count",
        "Number of inferences performed (does not include cached requests)",
        lambda s: s.inference_count,
    ),
    CounterSpec(
        "nv_inference_exec_count",
        "Number of model executions performed (does not include cached requests)",
        lambda s: s.execution_count,
    ),
)
LATENCY_COUNTERS = (
    CounterSpec(
        "nv_inference_request_duration_us",
        "Cumulative inference request duration in microseconds (includes cached requests)",
        lambda s: s.request_ns // 1000,
    ),
    CounterSpec(
        "nv_inference_queue_duration_us",
        "Cumulative inference queuing duration in microseconds (includes cached requests)",
        lambda s: s.queue_ns // 1000,
    ),
    CounterSpec(
        "nv_inference_compute_input_duration_us",
        "Cumulative compute input duration in microseconds (does not include cached requests)",
        lambda s: s.input_ns // 1000,
    ),
    CounterSpec(
        "nv_inference_compute_infer_duration_us",
        "Cumulative compute inference duration in microseconds (does not include cached requests)",
        lambda s: s.infer_ns // 1000,
    ),
    CounterSpec(
        "nv_inference_compute_output_duration_us",
        "Cumulative inference compute output duration in microseconds (does not include cached requests)",
        lambda s: s.output_ns // 1000,
    ),
)
CACHE_COUNTERS = (
    CounterSpec("nv_cache_num_hits_per_model", "Number of cache hits per model", lambda s: s.cache_hits),
    CounterSpec("nv_cache_num_misses_per_model", "Number of cache misses per model", lambda s: s.cache_misses),
    CounterSpec(
        "nv_cache_hit_duration_per_model",
        "Total cache hit duration per model, in microseconds",
        lambda s: s.cache_hit_ns // 1000,
    ),
    CounterSpec(
        "nv_cache_miss_duration_per_model",
        "Total cache miss (insert+lookup) duration per model, in microseconds",
        lambda s: s.cache_miss_ns // 1000,
    ),
)
SUMMARIES = {
    "request": (
        "nv_inference_request_summary_us",
        "Summary of inference request duration in microseconds (includes cached requests)",
    ),
    "queue": (
        "nv_inference_queue_summary_us",
        "Summary of inference queuing duration in microseconds (includes cached requests)",
    ),
    "compute_input": (
        "nv_inference_compute_input_summary_us",
        "Cumulative compute input duration in microseconds (does not include cached requests)",
    ),
    "compute_infer": (
        "nv_inference_compute_infer_summary_us",
        "Cumulative compute inference duration in microseconds (does not include cached requests)",
    ),
    "compute_output": (
        "nv_inference_compute_output_summary_us",
        "Cumulative inference compute output duration in microseconds (does not include cached requests)",
    ),
    "cache_hit": (
        "nv_cache_hit_summary_per_model",
        "Summary of cache hit duration per model, in microseconds",
    ),
    "cache_miss": (
        "nv_cache_miss_summary_per_model",
        "Summary of cache miss (insert+lookup) duration per model, in microseconds",
    ),
}
HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelStatistics], LatencyHistogram]], ...] = (
    (
        "enginehouse_request_duration_seconds",
        "Time from the request's arrival to its batch's end, cached requests included",
        lambda s: s.request_histogram,
    ),
    (
        "enginehouse_queue_duration_seconds",
        "Time that requests waited for an instance",
        lambda s: s.queue_histogram,
    ),
    (
        "enginehouse_compute_duration_seconds",
        "Time that the batch of a request took on its instance",
        lambda s: s.compute_histogram,
    ),
)
_LATENCY_BOUNDS = ["+Inf" if bound == float("inf") else f"{bound:g}" for bound, _ in LatencyHistogram().cumulative()]
_BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def model_families(
    models: Sequence[ModelSeries],
    failures: Iterable[tuple[Mapping[FailureReason, Labels], Mapping[FailureReason, int]]],
    settings: MetricsSettings,
    now_ns: int,
) -> Iterator[MetricFamily]:
    """Everything that is said of models. `failures` also has models that are not loaded any more."""
    yield _counter(COUNTERS[0], models)
    yield MetricFamily(
        "nv_inference_request_failure",
        "counter",
        "Number of failed inference requests, all batch sizes",
        [("", labels[reason], counts[reason]) for labels, counts in failures for reason in FailureReason],
    )
    for spec in (*COUNTERS[1:], *(LATENCY_COUNTERS if settings.counter_latencies else ())):
        yield _counter(spec, models)
    if settings.counter_latencies:
        cached = [model for model in models if model.has_cache]
        yield from (_counter(spec, cached) for spec in CACHE_COUNTERS)
    yield MetricFamily(
        "nv_inference_pending_request_count",
        "gauge",
        "Instantaneous number of pending requests awaiting execution per-model.",
        [("", model.labels, model.num_pending()) for model in models],
    )
    yield _first_response(models)
    yield from _summaries(models, settings, now_ns)
    yield from _own_families(models, settings, now_ns)


def sorted_labels(labels: Mapping[str, str]) -> Labels:
    """In the order in which Triton prints them; scripts match whole lines."""
    return Labels(dict(sorted(labels.items())))


def _counter(spec: CounterSpec, models: Iterable[ModelSeries]) -> MetricFamily:
    samples = [("", model.labels, spec.read(model.statistics)) for model in models]
    return MetricFamily(spec.name, "counter", spec.help, samples)


def _first_response(models: Iterable[ModelSeries]) -> MetricFamily:
    samples: list[Sample] = []
    for model in models:
        histogram = model.statistics.first_response
        if histogram is not None:
            samples += _histogram(model.labels, histogram.bounds_ms, histogram.counts, histogram.total_ms)
    return MetricFamily(FIRST_RESPONSE, "histogram", "Duration from request to first response in milliseconds", samples)


def _histogram(labels: Labels, bounds: Sequence[float], counts: Sequence[int], total: float) -> list[Sample]:
    """`counts` has one more item than `bounds`: what lies above them all."""
    samples: list[Sample] = []
    seen = 0
    for bound, count in zip([f"{bound:g}" for bound in bounds] + ["+Inf"], counts, strict=True):
        seen += count
        samples.append(("_bucket", labels.bucket(bound), seen))
    return [("_count", labels, seen), ("_sum", labels, total), *samples]


def _summaries(models: Iterable[ModelSeries], settings: MetricsSettings, now_ns: int) -> Iterator[MetricFamily]:
    if not settings.summary_latencies:
        return
    for phase, (name, text) in SUMMARIES.items():
        samples: list[Sample] = []
        for model in models:
            summaries = model.statistics.summaries
            if summaries is None or phase not in summaries.by_phase:
                continue
            sketch = summaries.by_phase[phase]
            samples += [("_count", model.labels, sketch.count), ("_sum", model.labels, sketch.total)]
            samples += [
                ("", {**model.labels, "quantile": f"{quantile:g}"}, value)
                for quantile, value in zip(sketch.quantiles, sketch.values(now_ns), strict=True)
            ]
        yield MetricFamily(name, "summary", text, samples)


def _own_families(models: Sequence[ModelSeries], settings: MetricsSettings, now_ns: int) -> Iterator[MetricFamily]:
    totals: dict[str, Callable[[ModelStatistics], int]] = {
        HISTOGRAMS[0][0]: lambda s: s.request_ns,
        HISTOGRAMS[1][0]: lambda s: s.queue_ns,
        HISTOGRAMS[2][0]: lambda s: s.input_ns + s.infer_ns + s.output_ns,
    }
    for name, text, read in HISTOGRAMS:
        samples: list[Sample] = []
        for model in models:
            pairs = read(model.statistics).cumulative()
            samples += [
                ("_bucket", model.labels.bucket(bound), count)
                for bound, (_, count) in zip(_LATENCY_BOUNDS, pairs, strict=True)
            ]
            samples.append(("_sum", model.labels, totals[name](model.statistics) / 1e9))
            samples.append(("_count", model.labels, pairs[-1][1]))
        yield MetricFamily(name, "histogram", text, samples)
    yield MetricFamily(
        "enginehouse_batch_size",
        "histogram",
        "Rows of the batches that instances ran",
        [sample for model in models for sample in _batch_sizes(model)],
    )
    yield MetricFamily(
        "enginehouse_requests_refused",
        "counter",
        "Number of requests that were refused at once, for a full queue or at the server's end",
        [("_total", model.labels, model.statistics.num_refused) for model in models],
    )
    yield MetricFamily(
        "enginehouse_model_saturation",
        "gauge",
        "Share of the model's instances that was busy since the last reading [0.0 - 1.0]",
        [("", model.labels, _saturation(model, settings.interval_ms, now_ns)) for model in models],
    )


def _batch_sizes(model: ModelSeries) -> list[Sample]:
    counts = [0] * (len(_BATCH_BOUNDS) + 1)
    total = 0
    for size, batch in model.statistics.batches.items():
        counts[next((i for i, bound in enumerate(_BATCH_BOUNDS) if size <= bound), -1)] += batch.count
        total += size * batch.count
    return _histogram(model.labels, _BATCH_BOUNDS, counts, total)


def _saturation(model: ModelSeries, interval_ms: float, now_ns: int) -> float:
    elapsed_ns = now_ns - model.read_ns
    if elapsed_ns < interval_ms * 1e6 / 2:
        return model.saturation
    busy_ns = model.statistics.busy_ns - model.read_busy_ns
    model.read_ns, model.read_busy_ns = now_ns, model.statistics.busy_ns
    model.saturation = min(1.0, busy_ns / (elapsed_ns * max(1, model.num_instances())))
    return model.saturation
