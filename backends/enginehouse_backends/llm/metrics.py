"""What an LLM counts, under vLLM's names, so that dashboards and autoscalers made for it work unchanged.

Written by the engine's thread alone; a reading from another thread may be one step old in some numbers.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from enginehouse.types import FinishReason, MetricFamily

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
Labels = Mapping[str, str]


def _counts_up_to(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, … up to `most`."""
    return tuple(m * 10**e for e in range(12) for m in (1, 2, 5) if m * 10**e <= most)


@dataclass(slots=True)
class Histogram:
    """Counts by upper bound."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def samples(self, labels: Labels) -> list[tuple[str, Labels, float]]:
        lines: list[tuple[str, Labels, float]] = []
        running = 0
        for bound, count in zip([*map(str, map(float, self.bounds)), "+Inf"], self.counts, strict=True):
            running += count
            lines.append(("_bucket", {**labels, "le": bound}, running))
        return [*lines, ("_sum", labels, self.total), ("_count", labels, running)]


class LlmMetrics:
    """One model's. Fields are set or raised by the engine; `families` reads them."""

    def __init__(self, model_name: str, max_model_len: int, cache_config: Mapping[str, str]) -> None:
        self.model_name = model_name
        self._labels = {"model_name": model_name, "engine": "0"}
        self._cache_config = {**cache_config, "engine": "0"}
        self.num_running = self.num_waiting = 0
        self.kv_usage = 0.0
        self.num_preemptions = 0
        self.num_rejections = 0
        self.prefix_queries = self.prefix_hits = 0
        self.prompt_tokens = self.prompt_tokens_cached = self.generation_tokens = 0
        self.finished = dict.fromkeys(FinishReason, 0)
        self.corrupted = 0
        lengths = _counts_up_to(max_model_len)
        self.step_tokens = Histogram(_STEP_TOKENS)
        self.request_prompt_tokens = Histogram(lengths)
        self.request_generation_tokens = Histogram(lengths)
        self.request_max_generation_tokens = Histogram(lengths)
        self.request_params_n = Histogram((1, 2, 5, 10, 20))
        self.request_params_max_tokens = Histogram(lengths)
        self.request_prefill_computed = Histogram(lengths)
        self.first_token_s = Histogram(_FIRST_TOKEN_S)
        self.token_s = Histogram(_TOKEN_S)
        self.time_per_token_s = Histogram(_TOKEN_S)
        self.request_s = Histogram(_REQUEST_S)
        self.queue_s = Histogram(_REQUEST_S)
        self.inference_s = Histogram(_REQUEST_S)
        self.prefill_s = Histogram(_REQUEST_S)
        self.decode_s = Histogram(_REQUEST_S)

    def families(self) -> list[MetricFamily]:
        return [*self._gauges(), *self._counters(), *self._histograms()]

    def _gauge(self, name: str, text: str, value: float) -> MetricFamily:
        return MetricFamily(f"vllm:{name}", "gauge", text, [("", self._labels, value)])

    def _counter(self, name: str, text: str, value: float) -> MetricFamily:
        return MetricFamily(f"vllm:{name}", "counter", text, [("_total", self._labels, value)])

    def _gauges(self) -> list[MetricFamily]:
        by_reason = [
            ("", {**self._labels, "reason": "capacity"}, float(self.num_waiting)),
            ("", {**self._labels, "reason": "deferred"}, 0.0),
        ]
        config = [("", {**self._labels, **self._cache_config}, 1.0)]
        return [
            self._gauge("num_requests_running", "Number of requests in model execution batches.", self.num_running),
            self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", self.num_waiting),
            MetricFamily(
                "vllm:num_requests_waiting_by_reason", "gauge", "Number of waiting requests by reason.", by_reason
            ),
            self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", self.kv_usage),
            MetricFamily("vllm:cache_config_info", "gauge", "Information of the KV cache.", config),
        ]

    def _counters(self) -> list[MetricFamily]:
        computed = self.prompt_tokens - self.prompt_tokens_cached
        by_source = [
            ("_total", {**self._labels, "source": "local_compute"}, float(computed)),
            ("_total", {**self._labels, "source": "local_cache_hit"}, float(self.prompt_tokens_cached)),
            ("_total", {**self._labels, "source": "external_kv_transfer"}, 0.0),
        ]
        finished = [
            ("_total", {**self._labels, "finished_reason": reason.value}, float(count))
            for reason, count in self.finished.items()
        ]
        rejected = [("_total", {**self._labels, "reason": "queue_full"}, float(self.num_rejections))]
        return [
            self._counter("num_preemptions", "Number of preemptions by the scheduler.", self.num_preemptions),
            MetricFamily("vllm:admission_rejections", "counter", "Number of requests refused at once.", rejected),
            self._counter(
                "prefix_cache_queries", "Prefix cache queries, in number of queried tokens.", self.prefix_queries
            ),
            self._counter("prefix_cache_hits", "Prefix cache hits, in number of cached tokens.", self.prefix_hits),
            self._counter("prompt_tokens", "Number of prefill tokens processed.", self.prompt_tokens),
            MetricFamily("vllm:prompt_tokens_by_source", "counter", "Number of prompt tokens by source.", by_source),
            self._counter(
                "prompt_tokens_cached", "Number of prompt tokens found in a cache.", self.prompt_tokens_cached
            ),
            self._counter("generation_tokens", "Number of generation tokens processed.", self.generation_tokens),
            MetricFamily("vllm:request_success", "counter", "Count of successfully processed requests.", finished),
            self._counter("corrupted_requests", "Requests whose logits were not numbers.", self.corrupted),
        ]

    def _histograms(self) -> list[MetricFamily]:
        named = (
            ("iteration_tokens_total", "Histogram of number of tokens per engine step.", self.step_tokens),
            ("request_prompt_tokens", "Number of prefill tokens processed.", self.request_prompt_tokens),
            ("request_generation_tokens", "Number of generation tokens processed.", self.request_generation_tokens),
            (
                "request_max_num_generation_tokens",
                "Histogram of maximum number of requested generation tokens.",
                self.request_max_generation_tokens,
            ),
            ("request_params_n", "Histogram of the n request parameter.", self.request_params_n),
            (
                "request_params_max_tokens",
                "Histogram of the max_tokens request parameter.",
                self.request_params_max_tokens,
            ),
            (
                "request_prefill_kv_computed_tokens",
                "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
                self.request_prefill_computed,
            ),
            ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", self.first_token_s),
            ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", self.token_s),
            (
                "request_time_per_output_token_seconds",
                "Histogram of time_per_output_token_seconds per request.",
                self.time_per_token_s,
            ),
            ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", self.request_s),
            (
                "request_queue_time_seconds",
                "Histogram of time spent in WAITING phase for request.",
                self.queue_s,
            ),
            (
                "request_inference_time_seconds",
                "Histogram of time spent in RUNNING phase for request.",
                self.inference_s,
            ),
            (
                "request_prefill_time_seconds",
                "Histogram of time spent in PREFILL phase for request.",
                self.prefill_s,
            ),
            ("request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.", self.decode_s),
        )
        return [
            MetricFamily(f"vllm:{name}", "histogram", text, histogram.samples(self._labels))
            for name, text, histogram in named
        ]
