"""Statistics as the API answers them: what counts as an inference, an execution, a success, a failure."""

from __future__ import annotations

import time

import numpy as np
import pytest

from enginehouse.errors import Cancelled, FailureReason, Internal, InvalidArgument, Unavailable
from enginehouse.execution.contract import ExecutionTimes, InstanceHandle
from enginehouse.observe.latencies import FirstResponseHistogram, LatencyHistogram, LatencySummaries
from enginehouse.observe.quantiles import NUM_AGES, RELATIVE_ERROR, WINDOW_NS, SlidingQuantiles
from enginehouse.observe.statistics import ModelStatistics
from enginehouse.scheduling.contract import ExecutionObserver
from enginehouse.types import InferRequest, InferResponse, Tensor

MS = 1_000_000


class Instance:
    name = "m_0_0"
    device = "cpu"
    group = 0
    num_slots = 1
    available = True

    def execute(self, batch: object) -> None:
        raise AssertionError

    def cancel(self, request: InferRequest) -> None:
        raise AssertionError


INSTANCE: InstanceHandle = Instance()


def request(rows: int = 1, waited_ms: int = 5) -> InferRequest:
    made = InferRequest("m", batch_size=rows)
    made.times.received_ns = made.times.queued_ns = time.monotonic_ns() - (waited_ms + 10) * MS
    return made


def run(statistics: ModelStatistics, *requests: InferRequest, error: Internal | None = None) -> None:
    """A batch that read its inputs for 1 ms, ran for 2 and wrote for 3."""
    start_ns = requests[0].times.queued_ns + 5 * MS
    for each in requests:
        each.times.started_ns = start_ns
    statistics.on_batch(
        requests,
        INSTANCE,
        ExecutionTimes(start_ns, start_ns + MS, start_ns + 3 * MS, start_ns + 6 * MS),
        error,
    )


def answer(statistics: ModelStatistics, to: InferRequest, response: InferResponse) -> None:
    statistics.on_response(to, response)
    to.num_responses += response.has_response


def test_it_is_an_observer_for_schedulers() -> None:
    observer: ExecutionObserver = ModelStatistics("m", "1")
    assert observer is not None


def test_a_version_that_nobody_asked_has_zeros() -> None:
    message = ModelStatistics("m", "3").message()
    assert (message.name, message.version, message.last_inference) == ("m", "3", 0)
    assert message.inference_stats.success.count == 0
    assert len(message.batch_stats) == 0


def test_null_rows_count_for_the_size_of_their_batch_alone() -> None:
    statistics = ModelStatistics("m", "1")
    one = request()
    statistics.on_batch([one], INSTANCE, ExecutionTimes(*[one.times.queued_ns] * 4), None, num_null_rows=2)
    message = statistics.message()
    assert (message.inference_count, message.execution_count, message.inference_stats.success.count) == (1, 1, 1)
    assert [(each.batch_size, each.compute_infer.count) for each in message.batch_stats] == [(3, 1)]


def test_inferences_are_rows_and_executions_are_batches() -> None:
    statistics = ModelStatistics("m", "1")
    run(statistics, request(3), request(1))
    run(statistics, request(4))
    run(statistics, request(0))
    message = statistics.message()
    assert message.inference_count == 9
    assert message.execution_count == 3
    assert [(each.batch_size, each.compute_infer.count) for each in message.batch_stats] == [(1, 1), (4, 2)]
    assert message.inference_stats.success.count == 4
    assert message.inference_stats.queue.count == 4
    assert message.inference_stats.compute_input.count == 4


def test_durations_are_summed_over_requests_and_batches() -> None:
    statistics = ModelStatistics("m", "1")
    run(statistics, request(1), request(1))
    message = statistics.message()
    stats = message.inference_stats
    assert stats.compute_input.ns == 2 * MS
    assert stats.compute_infer.ns == 4 * MS
    assert stats.compute_output.ns == 6 * MS
    assert stats.queue.ns == pytest.approx(10 * MS, rel=0.1)
    assert stats.success.ns >= 30 * MS
    assert message.batch_stats[0].compute_infer.ns == 2 * MS
    assert statistics.busy_ns == 6 * MS


def test_last_inference_is_wall_clock_milliseconds() -> None:
    statistics = ModelStatistics("m", "1")
    run(statistics, request())
    assert abs(statistics.message().last_inference - time.time() * 1000) < 1000


def test_an_error_that_the_model_answered_is_a_success() -> None:
    statistics = ModelStatistics("m", "1")
    one = request()
    answer(statistics, one, InferResponse(error=Internal("told to fail")))
    run(statistics, one)
    stats = statistics.message().inference_stats
    assert (stats.success.count, stats.fail.count) == (1, 0)


def test_a_batch_that_raised_fails_its_requests() -> None:
    statistics = ModelStatistics("m", "1")
    both = [request(), request()]
    error = Internal("boom", reason=FailureReason.BACKEND)
    for one in both:
        answer(statistics, one, InferResponse(error=error))
    run(statistics, *both, error=error)
    message = statistics.message()
    assert (message.inference_stats.success.count, message.inference_stats.fail.count) == (0, 2)
    assert message.inference_stats.fail.ns > 0
    assert (message.inference_count, message.execution_count) == (0, 1)
    assert statistics.failures[FailureReason.BACKEND] == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Unavailable("Exceeds maximum queue size", reason=FailureReason.REJECTED), FailureReason.REJECTED),
        (Cancelled("cancelled", reason=FailureReason.CANCELED), FailureReason.CANCELED),
        (Internal("step failed", reason=FailureReason.OTHER), FailureReason.OTHER),
    ],
)
def test_refusals_count_under_their_reason(error: Internal, reason: FailureReason) -> None:
    statistics = ModelStatistics("m", "1")
    answer(statistics, request(), InferResponse(error=error))
    assert statistics.failures == {each: int(each is reason) for each in FailureReason}


def test_requests_that_no_queue_took_are_refused_and_no_failures() -> None:
    statistics = ModelStatistics("m", "1")
    statistics.on_refusal(Unavailable("Exceeds maximum queue size", reason=FailureReason.REJECTED))
    statistics.on_refusal(InvalidArgument("must specify the START flag"))
    assert statistics.num_refused == 1
    assert statistics.message().inference_stats.fail.count == 0
    assert statistics.failures[FailureReason.REJECTED] == 0


def test_invalid_requests_are_no_failures() -> None:
    statistics = ModelStatistics("m", "1")
    statistics.on_failure(request(), InvalidArgument("inference request batch-size must be <= 4 for 'm'"))
    assert statistics.message().inference_stats.fail.count == 0


def test_a_request_cancelled_while_its_batch_ran_is_not_also_a_success() -> None:
    statistics = ModelStatistics("m", "1")
    gone, stayed = request(2), request(1)
    answer(statistics, gone, InferResponse(error=Cancelled("gone", reason=FailureReason.CANCELED)))
    run(statistics, gone, stayed)
    message = statistics.message()
    assert (message.inference_stats.success.count, message.inference_stats.fail.count) == (1, 1)
    assert message.inference_count == 1
    assert message.batch_stats[0].batch_size == 3


def test_cached_answers_are_successes_but_no_inferences() -> None:
    statistics = ModelStatistics("m", "1")
    first = request()
    statistics.on_cache_miss(first, 100, 200)
    run(statistics, first)
    statistics.on_cache_hit(request(), 70)
    message = statistics.message()
    stats = message.inference_stats
    assert (stats.success.count, stats.queue.count, stats.compute_infer.count) == (2, 2, 1)
    assert (stats.cache_hit.count, stats.cache_hit.ns) == (1, 70)
    assert (stats.cache_miss.count, stats.cache_miss.ns) == (1, 300)
    assert (message.inference_count, message.execution_count) == (1, 1)


def test_answers_of_decoupled_requests_are_counted_by_index_when_asked_for() -> None:
    statistics = ModelStatistics("m", "1", keep_responses=True)
    one, output = request(), Tensor.from_numpy("Y", np.zeros(1, "f4"))
    answer(statistics, one, InferResponse(outputs=[output], final=False))
    answer(statistics, one, InferResponse(error=Internal("bad"), final=False))
    answer(statistics, one, InferResponse(has_response=False))
    two = request()
    answer(statistics, two, InferResponse(outputs=[output]))
    stats = statistics.message().response_stats
    assert (stats["0"].success.count, stats["1"].fail.count, stats["2"].empty_response.count) == (2, 1, 1)
    assert statistics._response_ns == {}


def test_without_asking_there_are_no_response_statistics() -> None:
    statistics = ModelStatistics("m", "1")
    answer(statistics, request(), InferResponse())
    assert len(statistics.message().response_stats) == 0


def test_the_first_answer_is_timed_once() -> None:
    histogram = FirstResponseHistogram([100, 500])
    statistics = ModelStatistics("m", "1", first_response=histogram)
    one = request()
    answer(statistics, one, InferResponse(final=False))
    answer(statistics, one, InferResponse(final=True))
    assert histogram.counts == [1, 0, 0]


def test_summaries_leave_whole_requests_out_when_there_is_a_cache() -> None:
    now_ns = time.monotonic_ns()
    plain = ModelStatistics("m", "1", summaries=LatencySummaries((0.5,), now_ns, with_cache=False))
    cached = ModelStatistics("m", "1", summaries=LatencySummaries((0.5,), now_ns, with_cache=True))
    for statistics in (plain, cached):
        run(statistics, request())
    cached.on_cache_hit(request(), 5000)
    assert plain.summaries is not None
    assert cached.summaries is not None
    assert plain.summaries.by_phase["request"].count == 1
    assert "request" not in cached.summaries.by_phase
    assert cached.summaries.by_phase["cache_hit"].total == 5
    assert cached.summaries.by_phase["queue"].count == 2


def test_counting_costs_little() -> None:
    """A request of a batch of 8 costs under 2 us; the bound is generous because machines are shared."""
    statistics = ModelStatistics("m", "1")
    batch = [request() for _ in range(8)]
    start = time.thread_time_ns()
    for _ in range(200):
        run(statistics, *batch)
    assert (time.thread_time_ns() - start) / (200 * 8) < 20_000


class TestSlidingQuantiles:
    def test_values_are_right_to_the_relative_error(self) -> None:
        sketch = SlidingQuantiles((0.5, 0.99, 1.0), 0)
        for value in range(1, 10_001):
            sketch.observe(value, 0)
        for got, expected in zip(sketch.values(0), (5000, 9900, 10_000), strict=True):
            assert got == pytest.approx(expected, rel=2 * RELATIVE_ERROR)

    def test_old_values_leave_the_window_but_stay_in_the_count(self) -> None:
        sketch = SlidingQuantiles((0.5,), 0)
        sketch.observe(1_000_000, 0)
        sketch.observe(10, WINDOW_NS)
        sketch.observe(10, WINDOW_NS + WINDOW_NS // NUM_AGES)
        assert sketch.values(WINDOW_NS + WINDOW_NS // NUM_AGES)[0] == pytest.approx(10, rel=0.02)
        assert (sketch.count, sketch.total) == (3, 1_000_020)

    def test_an_empty_window_has_no_quantiles(self) -> None:
        sketch = SlidingQuantiles((0.5,), 0)
        sketch.observe(5, 0)
        (value,) = sketch.values(100 * WINDOW_NS)
        assert value != value

    def test_zero_is_a_value(self) -> None:
        sketch = SlidingQuantiles((0.5,), 0)
        sketch.observe(0, 0)
        assert sketch.values(0) == [1.0]


def test_the_latency_histogram_is_cumulative() -> None:
    histogram = LatencyHistogram()
    for ns in (0, 63_000, 64_000, 100_000_000, 10**15):
        histogram.observe_ns(ns)
    pairs = dict(histogram.cumulative())
    assert pairs[64e-6] == 2
    assert pairs[128e-6] == 3
    assert pairs[2**17 / 1e6] == 4
    assert pairs[float("inf")] == 5
