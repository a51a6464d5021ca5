"""What happened to one version's requests: counted as it happens, read by the statistics API and by metrics.

On the server's loop. The way of a request only adds to integers; everything derived is made when it is read.
What counts as what is Triton's: a success is a request whose batch ran, whatever the model answered; a
failure is one whose final error carries a FailureReason; cached answers are successes but no inferences.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from enginehouse.config.schema import (
    InferBatchStatistics,
    InferResponseStatistics,
    InferStatistics,
    StatisticDuration,
)
from enginehouse.config.schema import ModelStatistics as StatisticsMessage
from enginehouse.errors import EnginehouseError, FailureReason
from enginehouse.observe.latencies import FirstResponseHistogram, LatencyHistogram, LatencySummaries
from enginehouse.types import InferRequest, InferResponse


class BatchTimes(Protocol):
    """execution.contract.ExecutionTimes, which lies above this layer."""

    @property
    def start_ns(self) -> int: ...
    @property
    def input_end_ns(self) -> int: ...
    @property
    def output_start_ns(self) -> int: ...
    @property
    def end_ns(self) -> int: ...


@dataclass(slots=True)
class BatchCounts:
    """Executions of one batch size."""

    count: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0


@dataclass(slots=True)
class ResponseCounts:
    """The n-th answers of decoupled requests."""

    success: int = 0
    success_ns: int = 0
    fail: int = 0
    fail_ns: int = 0
    empty: int = 0
    empty_ns: int = 0
    cancel: int = 0
    cancel_ns: int = 0


def new_failure_counts() -> dict[FailureReason, int]:
    """Failures outlive a reload: whoever reloads a model passes the same counts on."""
    return dict.fromkeys(FailureReason, 0)


@dataclass(slots=True, eq=False)
class ModelStatistics:
    """One version's counts since it was loaded. An ExecutionObserver for schedulers."""

    name: str
    version: str
    failures: dict[FailureReason, int] = field(default_factory=new_failure_counts)
    summaries: LatencySummaries | None = None
    first_response: FirstResponseHistogram | None = None
    keep_responses: bool = False

    success: int = 0
    fail: int = 0
    fail_ns: int = 0
    inference_count: int = 0
    execution_count: int = 0
    request_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    cache_hits: int = 0
    cache_hit_ns: int = 0
    cache_misses: int = 0
    cache_miss_ns: int = 0
    num_refused: int = 0
    """Requests that the scheduler did not take, such as for a full queue; no failures."""
    busy_ns: int = 0
    """Time that instances worked, each batch once."""
    last_execution_ns: int = 0
    batches: dict[int, BatchCounts] = field(default_factory=dict)
    responses: dict[int, ResponseCounts] = field(default_factory=dict)
    request_histogram: LatencyHistogram = field(default_factory=LatencyHistogram)
    queue_histogram: LatencyHistogram = field(default_factory=LatencyHistogram)
    compute_histogram: LatencyHistogram = field(default_factory=LatencyHistogram)
    _response_ns: dict[int, int] = field(default_factory=dict)
    """By id of the request: when its last answer came. Only with `keep_responses`."""

    # --- events

    def on_batch(
        self,
        requests: Sequence[InferRequest],
        instance: object,
        times: BatchTimes,
        error: EnginehouseError | None,
        num_null_rows: int = 0,
    ) -> None:
        """A batch ran. With an error none of its requests succeeded; their answers say why."""
        start_ns = times.start_ns
        input_ns = times.input_end_ns - start_ns
        infer_ns = times.output_start_ns - times.input_end_ns
        output_ns = times.end_ns - times.output_start_ns
        rows = sum([request.batch_size or 1 for request in requests])
        self._count_batch(rows + num_null_rows, times.end_ns, input_ns, infer_ns, output_ns)
        if error is not None:
            return
        now_ns = time.monotonic_ns()
        request_bins, queue_bins = self.request_histogram.bins, self.queue_histogram.bins
        num_succeeded = 0
        for request in requests:
            if request.failed:
                rows -= request.batch_size or 1
                continue
            num_succeeded += 1
            stamps = request.times
            whole_ns = now_ns - (stamps.received_ns or stamps.queued_ns)
            waited_ns = start_ns - stamps.queued_ns
            self.request_ns += whole_ns
            self.queue_ns += waited_ns
            request_bins[(whole_ns // 1000).bit_length()] += 1
            queue_bins[(waited_ns // 1000).bit_length()] += 1
            if self.summaries is not None:
                self.summaries.observe(now_ns, whole_ns, waited_ns, input_ns, infer_ns, output_ns)
        self.success += num_succeeded
        self.inference_count += rows
        self.input_ns += input_ns * num_succeeded
        self.infer_ns += infer_ns * num_succeeded
        self.output_ns += output_ns * num_succeeded
        self.compute_histogram.bins[((times.end_ns - start_ns) // 1000).bit_length()] += num_succeeded

    def _count_batch(self, rows: int, end_ns: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        self.execution_count += 1
        self.last_execution_ns = end_ns
        self.busy_ns += input_ns + infer_ns + output_ns
        batch = self.batches.get(rows)
        if batch is None:
            batch = self.batches[rows] = BatchCounts()
        batch.count += 1
        batch.input_ns += input_ns
        batch.infer_ns += infer_ns
        batch.output_ns += output_ns

    def on_cache_hit(self, request: InferRequest, lookup_ns: int) -> None:
        """Answered from the cache: a success that no instance ran."""
        now_ns = time.monotonic_ns()
        stamps = request.times
        whole_ns = now_ns - (stamps.received_ns or stamps.queued_ns)
        waited_ns = max(0, now_ns - lookup_ns - stamps.queued_ns)
        self.success += 1
        self.request_ns += whole_ns
        self.queue_ns += waited_ns
        self.cache_hits += 1
        self.cache_hit_ns += lookup_ns
        self.request_histogram.observe_ns(whole_ns)
        self.queue_histogram.observe_ns(waited_ns)
        if self.summaries is not None:
            self.summaries.observe_cache_hit(now_ns, waited_ns, lookup_ns)

    def on_cache_miss(self, request: InferRequest, lookup_ns: int, insert_ns: int) -> None:
        """The request ran and is counted by its batch; this adds what the cache cost it."""
        cost_ns = lookup_ns + insert_ns
        self.request_ns += cost_ns
        self.cache_misses += 1
        self.cache_miss_ns += cost_ns
        if self.summaries is not None:
            self.summaries.observe_cache_miss(time.monotonic_ns(), cost_ns)

    def on_response(self, request: InferRequest, response: InferResponse) -> None:
        if self.keep_responses:
            self._count_response(request, response)
        if self.first_response is not None and response.has_response and request.num_responses == 0:
            stamps = request.times
            self.first_response.observe_ns(time.monotonic_ns() - (stamps.received_ns or stamps.queued_ns))
        if response.error is not None and response.final:
            self.on_failure(request, response.error)

    def on_failure(self, request: InferRequest, error: EnginehouseError) -> None:
        """The request ended badly. Errors without a reason are not failures: the model answered them, or the
        core refused a request that it had not accepted."""
        if error.reason is None or request.failed:
            return
        request.failed = True
        stamps = request.times
        started_ns = stamps.received_ns or stamps.queued_ns
        self.failures[error.reason] += 1
        self.fail += 1
        if started_ns:
            self.fail_ns += time.monotonic_ns() - started_ns

    def on_refusal(self, error: EnginehouseError) -> None:
        """The scheduler did not take the request. Triton counts that nowhere, so neither do its families."""
        if error.reason is not None:
            self.num_refused += 1

    def _count_response(self, request: InferRequest, response: InferResponse) -> None:
        now_ns = time.monotonic_ns()
        since_ns = now_ns - self._response_ns.pop(id(request), request.times.started_ns or now_ns)
        if not response.final:
            self._response_ns[id(request)] = now_ns
        counts = self.responses.setdefault(request.num_responses, ResponseCounts())
        if response.error is not None and response.error.reason is FailureReason.CANCELED:
            counts.cancel += 1
            counts.cancel_ns += since_ns
        elif response.error is not None:
            counts.fail += 1
            counts.fail_ns += since_ns
        elif not response.has_response or not response.outputs:
            counts.empty += 1
            counts.empty_ns += since_ns
        else:
            counts.success += 1
            counts.success_ns += since_ns

    # --- reading

    def message(self) -> StatisticsMessage:
        """As the statistics API answers it."""
        message = StatisticsMessage(
            name=self.name,
            version=self.version,
            last_inference=self.last_inference_ms(),
            inference_count=self.inference_count,
            execution_count=self.execution_count,
            inference_stats=self._inference_message(),
            batch_stats=[_batch_message(size, self.batches[size]) for size in sorted(self.batches)],
        )
        for index, counts in sorted(self.responses.items()):
            message.response_stats[str(index)].CopyFrom(_response_message(counts))
        return message

    def last_inference_ms(self) -> int:
        """Milliseconds since 1970 of the last execution's end; 0 if there was none."""
        if not self.last_execution_ns:
            return 0
        return (time.time_ns() - time.monotonic_ns() + self.last_execution_ns) // 1_000_000

    def _inference_message(self) -> InferStatistics:
        num_computed = self.success - self.cache_hits
        return InferStatistics(
            success=_duration(self.success, self.request_ns),
            fail=_duration(self.fail, self.fail_ns),
            queue=_duration(self.success, self.queue_ns),
            compute_input=_duration(num_computed, self.input_ns),
            compute_infer=_duration(num_computed, self.infer_ns),
            compute_output=_duration(num_computed, self.output_ns),
            cache_hit=_duration(self.cache_hits, self.cache_hit_ns),
            cache_miss=_duration(self.cache_misses, self.cache_miss_ns),
        )


def _duration(count: int, ns: int) -> StatisticDuration:
    """What happened took time, even where the clock didn't see it: clients divide by these sums."""
    return StatisticDuration(count=count, ns=max(ns, count))


def _batch_message(size: int, counts: BatchCounts) -> InferBatchStatistics:
    return InferBatchStatistics(
        batch_size=size,
        compute_input=_duration(counts.count, counts.input_ns),
        compute_infer=_duration(counts.count, counts.infer_ns),
        compute_output=_duration(counts.count, counts.output_ns),
    )


def _response_message(counts: ResponseCounts) -> InferResponseStatistics:
    count = counts.success + counts.fail + counts.empty
    ns = counts.success_ns + counts.fail_ns + counts.empty_ns
    return InferResponseStatistics(
        compute_infer=_duration(count, ns),
        compute_output=_duration(counts.success, 0),
        success=_duration(counts.success, counts.success_ns),
        fail=_duration(counts.fail, counts.fail_ns),
        empty_response=_duration(counts.empty, counts.empty_ns),
        cancel=_duration(counts.cancel, counts.cancel_ns),
    )
