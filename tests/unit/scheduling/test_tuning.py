"""The tuner finds batch sizes and delays that keep a latency target, in simulated time."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from enginehouse.config.schema import ModelStatistics
from enginehouse.scheduling.dynamic_batching import Cut, DynamicBatching, Wait
from enginehouse.scheduling.length_batching import LengthBatching
from enginehouse.scheduling.queue import RequestQueue, Ticket
from enginehouse.scheduling.tuning import BatchTuner, TunedBatching, Tuning
from enginehouse.scheduling.tuning_report import frozen_config, with_tuning
from enginehouse.types import InferRequest

from .factories import batching_config, rig_of


class Simulation:
    """One instance whose batches of n rows take `seconds(n)`; requests arrive at random, so many a second."""

    def __init__(self, policy: TunedBatching | DynamicBatching, seconds: Callable[[int], float], rate: float) -> None:
        self.policy = policy
        self.seconds = seconds
        self.rate = rate
        self.queue = RequestQueue()
        self.rng = random.Random(5)
        self.now_s = 0.0
        self.latencies_s: list[float] = []
        self.sizes: list[int] = []
        self._next_arrival_s = 0.0

    def run(self, duration_s: float) -> None:
        end_s = self.now_s + duration_s
        while self.now_s < end_s:
            self._arrive_until(self.now_s)
            decision = self.policy.decide(self.queue, int(self.now_s * 1e9))
            if decision is None:
                self.now_s = self._next_arrival_s
            elif isinstance(decision, Wait):
                self.now_s = min(max(decision.until_ns / 1e9, self.now_s + 1e-6), max(self._next_arrival_s, self.now_s))
                self.now_s += 1e-9
            else:
                self._finish(decision)

    def _arrive_until(self, now_s: float) -> None:
        while self._next_arrival_s <= now_s:
            arrival_ns = int(self._next_arrival_s * 1e9)
            self.queue.add(Ticket(InferRequest("m", batch_size=1), arrival_ns))
            if isinstance(self.policy, TunedBatching):
                self.policy.tuner.arrived(arrival_ns)
            self._next_arrival_s += self.rng.expovariate(self.rate)

    def _finish(self, cut: Cut) -> None:
        self.queue.cut(cut.tickets)
        took_s = self.seconds(len(cut.tickets)) * self.rng.uniform(0.97, 1.03)
        self.now_s += took_s
        self.policy.learn(cut, took_s)
        self.sizes.append(len(cut.tickets))
        for ticket in cut.tickets:
            latency_s = self.now_s - ticket.queued_ns / 1e9
            self.latencies_s.append(latency_s)
            if isinstance(self.policy, TunedBatching):
                self.policy.tuner.answered(latency_s)

    def p99_s(self) -> float:
        """Of the second half of all answers."""
        late = sorted(self.latencies_s[len(self.latencies_s) // 2 :])
        return late[int(0.99 * len(late))]


def tuned(target_ms: float, max_rows: int = 64, max_delay_ms: float = 1000) -> TunedBatching:
    tuner = BatchTuner(target_ms / 1000, max_rows, max_delay_ms / 1000)
    return TunedBatching(DynamicBatching(max_rows), tuner)


def line(overhead_ms: float, row_ms: float) -> Callable[[int], float]:
    return lambda rows: (overhead_ms + rows * row_ms) / 1000


def test_the_target_limits_the_size() -> None:
    policy = tuned(target_ms=40)
    simulation = Simulation(policy, line(2, 1), rate=300)
    simulation.run(30)
    assert 10 < policy.tuning.max_rows <= 23
    assert simulation.p99_s() <= 0.040


@pytest.mark.parametrize("rate", [5, 50, 200, 600])
@pytest.mark.parametrize(("overhead_ms", "row_ms"), [(5, 0.2), (1, 1)])
def test_a_target_that_can_be_kept_is_kept(rate: float, overhead_ms: float, row_ms: float) -> None:
    policy = tuned(target_ms=60)
    simulation = Simulation(policy, line(overhead_ms, row_ms), rate)
    simulation.run(20 if rate > 100 else 60)
    assert simulation.p99_s() <= 0.060


def test_with_little_traffic_nobody_waits_for_company() -> None:
    policy = tuned(target_ms=200)
    simulation = Simulation(policy, line(5, 0.1), rate=10)
    simulation.run(60)
    assert policy.tuning.delay_us == 0
    assert simulation.p99_s() < 0.015


def test_with_much_traffic_a_delay_saves_work() -> None:
    policy = tuned(target_ms=100)
    simulation = Simulation(policy, line(5, 0.1), rate=150)
    simulation.run(30)
    assert policy.tuning.delay_us > 0
    late_sizes = simulation.sizes[len(simulation.sizes) // 2 :]
    assert sum(late_sizes) / len(late_sizes) > 2
    assert simulation.p99_s() <= 0.100


def test_the_longest_delay_can_be_given() -> None:
    policy = tuned(target_ms=100, max_delay_ms=2)
    Simulation(policy, line(5, 0.1), rate=800).run(20)
    assert 0 < policy.tuning.delay_us <= 2000


def test_when_the_instance_can_not_keep_up_batches_grow() -> None:
    policy = tuned(target_ms=12)
    simulation = Simulation(policy, line(5, 0.2), rate=2500)
    simulation.run(10)
    assert policy.tuning.max_rows > 40
    assert len(simulation.latencies_s) > 0.9 * 2500 * 10


def test_a_model_that_gains_nothing_from_batches_is_not_delayed() -> None:
    policy = tuned(target_ms=100)
    Simulation(policy, line(0.01, 2), rate=300).run(20)
    assert policy.tuning.delay_us == 0


def test_a_model_that_becomes_slower_gets_smaller_batches() -> None:
    policy = tuned(target_ms=40)
    simulation = Simulation(policy, line(2, 0.2), rate=200)
    simulation.run(10)
    before = policy.tuning.max_rows
    simulation.seconds = line(2, 2)
    simulation.run(20)
    assert policy.tuning.max_rows < before


def test_the_tuner_sets_size_and_delay_of_length_batching_too() -> None:
    inner = LengthBatching(DynamicBatching(64), max)
    policy = TunedBatching(inner, BatchTuner(0.04, 64, 1.0))
    Simulation(policy, line(2, 1), rate=300).run(5)
    assert inner.plain.max_rows == policy.tuning.max_rows < 64


def test_the_scheduler_shows_what_was_decided() -> None:
    config = batching_config(max_batch_size=16)
    config.serving.batching.target_p99_ms = 50
    config.serving.batching.max_size = 8
    rig = rig_of(config)
    for value in range(100):
        rig.send(value)
        rig.clock.advance(ms=5)
        rig.run_all()
    tuning = rig.scheduler.tuning  # type: ignore[attr-defined]  # only batching schedulers have one
    assert 1 <= tuning.max_rows <= 8
    assert tuning.arrivals_per_s == pytest.approx(200, rel=0.1)
    assert rig_of(batching_config()).scheduler.tuning is None  # type: ignore[attr-defined]


def test_a_decision_can_be_frozen_into_a_config() -> None:
    config = batching_config("preferred_batch_size: [2, 4]", max_batch_size=16)
    config.serving.batching.target_p99_ms = 50
    frozen = frozen_config(config, Tuning(8, 1500))
    assert list(frozen.dynamic_batching.preferred_batch_size) == [8]
    assert frozen.dynamic_batching.max_queue_delay_microseconds == 1500
    assert not frozen.serving.batching.target_p99_ms
    assert config.serving.batching.target_p99_ms == 50


def test_statistics_tell_what_was_decided() -> None:
    config = batching_config(max_batch_size=16)
    assert not with_tuning(ModelStatistics(), rig_of(config).scheduler).HasField("tuning")
    config.serving.batching.target_p99_ms = 50
    rig = rig_of(config)
    rig.send(1)
    rig.clock.run_soon()
    assert with_tuning(ModelStatistics(), rig.scheduler).tuning.max_batch_size == 16
