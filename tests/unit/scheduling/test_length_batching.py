"""Requests of different lengths share padded batches when that saves time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.scheduling.batch_cost import BatchCost
from enginehouse.scheduling.dynamic_batching import Cut, DynamicBatching, Wait
from enginehouse.scheduling.length_batching import LengthBatching
from enginehouse.scheduling.queue import QueuePolicy, RequestQueue, Ticket
from enginehouse.types import InferRequest


def queue_of(*lengths: int, shape_keys: tuple[int, ...] = (), rows: tuple[int, ...] = ()) -> RequestQueue:
    """Requests of these lengths, one microsecond apart."""
    queue = RequestQueue()
    for number, length in enumerate(lengths):
        request = InferRequest("m", batch_size=rows[number] if rows else 1)
        ticket = Ticket(request, 1000 * number, shape_keys[number] if shape_keys else None)
        ticket.length = length
        queue.add(ticket)
    return queue


def longest(lengths: object) -> int:
    return max(lengths)  # type: ignore[call-overload,no-any-return]  # a sequence of lengths


def cut_lengths(policy: LengthBatching, queue: RequestQueue) -> list[int]:
    decision = policy.decide(queue, 1_000_000)
    assert isinstance(decision, Cut)
    return [ticket.length for ticket in decision.tickets]


def learned(overhead_s: float, per_token_s: float) -> BatchCost:
    cost = BatchCost()
    for size in (10, 50, 100, 400) * 5:
        cost.learn(size, overhead_s + per_token_s * size)
    return cost


def test_the_head_of_the_queue_runs_with_its_neighbours_in_length() -> None:
    policy = LengthBatching(DynamicBatching(4), longest)
    assert sorted(cut_lengths(policy, queue_of(100, 8, 101, 9, 99, 250))) == [99, 100, 101]


def test_the_head_runs_although_it_fits_nobody() -> None:
    policy = LengthBatching(DynamicBatching(4), longest, max_waste=0.1)
    assert cut_lengths(policy, queue_of(250, 8, 8, 8, 8)) == [250]


def test_a_device_with_much_overhead_takes_larger_batches() -> None:
    queue = queue_of(100, 50, 60, 70, 80, 90)
    cheap = LengthBatching(DynamicBatching(8), longest, cost=learned(0.0, 1e-3))
    dear = LengthBatching(DynamicBatching(8), longest, cost=learned(1.0, 1e-6))
    assert len(cut_lengths(cheap, queue)) < 3
    assert len(cut_lengths(dear, queue)) == 6


def test_a_limit_on_waste_is_kept() -> None:
    policy = LengthBatching(DynamicBatching(8), longest, max_waste=0.05, cost=learned(1.0, 1e-6))
    assert sorted(cut_lengths(policy, queue_of(100, 50, 98, 97, 60))) == [97, 98, 100]


def test_other_shapes_and_less_urgent_levels_stay_out() -> None:
    policy = LengthBatching(DynamicBatching(8), longest)
    assert cut_lengths(policy, queue_of(10, 10, 10, shape_keys=(1, 2, 1))) == [10, 10]
    queue = RequestQueue((QueuePolicy(), QueuePolicy()))
    for priority in (1, 2, 1):
        queue.add(Ticket(InferRequest("m", priority=priority), 0))
    decision = policy.decide(queue, 1000)
    assert isinstance(decision, Cut)
    assert [ticket.request.priority for ticket in decision.tickets] == [1, 1]


def test_rows_of_large_requests_count() -> None:
    policy = LengthBatching(DynamicBatching(4), longest, cost=learned(1.0, 1e-6))
    decision = policy.decide(queue_of(10, 10, 10, rows=(2, 3, 1)), 10_000)
    assert isinstance(decision, Cut)
    assert sum(ticket.rows for ticket in decision.tickets) <= 4


def test_a_delay_holds_an_incomplete_batch() -> None:
    policy = LengthBatching(DynamicBatching(4, frozenset({4}), delay_ns=500), longest)
    assert isinstance(policy.decide(queue_of(10, 10), 499), Wait)
    assert isinstance(policy.decide(queue_of(10, 10), 500), Cut)


def test_nothing_waits_nothing_is_cut() -> None:
    assert LengthBatching(DynamicBatching(4), longest).decide(RequestQueue(), 0) is None


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 3)), min_size=1, max_size=40), st.integers(3, 9))
def test_every_cut_has_the_head_and_no_more_rows_than_allowed(requests: list[tuple[int, int]], max_rows: int) -> None:
    lengths, rows = zip(*requests, strict=True)
    queue = queue_of(*lengths, rows=rows)
    policy = LengthBatching(DynamicBatching(max_rows), longest)
    served = 0
    while (decision := policy.decide(queue, 10_000_000)) is not None:
        assert isinstance(decision, Cut)
        assert next(iter(queue)) in decision.tickets
        assert sum(ticket.rows for ticket in decision.tickets) <= max_rows
        queue.take(decision.tickets)
        served += len(decision.tickets)
    assert served == len(requests)


def test_much_traffic_of_mixed_lengths_comes_near_the_bound() -> None:
    """64 clients in a closed loop, lengths 8 to 256, 5 ms and 0.115 ms a token: MiniLM on one CPU core."""
    overhead_s, token_s, rng = 5e-3, 0.115e-3, random.Random(1)
    policy, queue = LengthBatching(DynamicBatching(16), longest), RequestQueue()
    now_s, tokens, latencies_s = 0.0, 0, []

    def arrive() -> None:
        ticket = Ticket(InferRequest("m", batch_size=1), int(now_s * 1e9))
        ticket.length = rng.randint(8, 256)
        queue.add(ticket)

    for _ in range(64):
        arrive()
    while now_s < 60:
        decision = policy.decide(queue, int(now_s * 1e9))
        assert isinstance(decision, Cut)
        queue.take(decision.tickets)
        seconds = overhead_s + token_s * decision.size
        policy.learn(decision, seconds)
        now_s += seconds
        for ticket in decision.tickets:
            tokens += ticket.length
            latencies_s.append(now_s - ticket.queued_ns / 1e9)
            arrive()
    assert tokens * token_s / now_s > 0.86
    assert sorted(latencies_s)[int(0.99 * len(latencies_s))] < 2.0


# --- the cost of batches


def test_a_line_is_found_in_what_batches_took() -> None:
    line = learned(0.005, 0.0001).line
    assert line == pytest.approx((0.005, 0.0001), rel=1e-6)


def test_old_batches_are_forgotten() -> None:
    cost = learned(0.005, 0.0001)
    for size in (10, 50, 100, 400) * 100:
        cost.learn(size, 0.001 + 0.0002 * size)
    assert cost.line == pytest.approx((0.001, 0.0002), rel=3e-2)


def test_little_and_uniform_experience_is_no_line() -> None:
    cost = BatchCost()
    cost.learn(8, 0.2)
    assert (cost.line, cost.overhead(64), cost.seconds(5)) == (None, 64, None)
    for _ in range(20):
        cost.learn(8, 0.2)
    assert cost.line is None
    assert cost.seconds(5) == pytest.approx(0.2)
    assert cost.seconds(8) == pytest.approx(0.2)
    assert cost.seconds(16) == pytest.approx(0.4)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 2)), min_size=10, max_size=40))
def test_overhead_and_slope_are_never_negative(batches: list[tuple[int, float]]) -> None:
    cost = BatchCost()
    for size, seconds in batches:
        cost.learn(size, seconds)
    overhead_s, slope = cost.line or (0.0, 0.0)
    assert overhead_s >= -1e-9
    assert slope >= 0


def test_a_machine_that_others_disturb_does_not_look_like_overhead() -> None:
    rng = random.Random(4)
    cost = BatchCost()
    for _ in range(400):
        size = rng.randint(8, 500)
        cost.learn(size, 0.00025 * size * rng.uniform(0.8, 2.0))
    assert cost.overhead(64) < 8
