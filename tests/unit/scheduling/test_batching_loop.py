"""Queue, dynamic batcher and loop together, on a manual clock."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from enginehouse.errors import Cancelled, Unavailable

from .factories import batching_config, config_of, request_of, rig_of

PLAIN = config_of('name: "m" max_batch_size: 8 input { name: "X" data_type: TYPE_INT32 dims: [1] }')


def test_without_dynamic_batching_every_request_runs_alone() -> None:
    rig = rig_of(PLAIN)
    answers = [rig.send(1), rig.send(2), rig.send(3)]
    rig.run_all()
    assert [answer.values() for answer in answers] == [[[1]], [[2]], [[3]]]
    assert rig.instance.sizes == [1, 1, 1]


def test_a_free_instance_gets_a_lone_request_at_once() -> None:
    rig = rig_of(PLAIN)
    rig.send(1)
    assert rig.waiting_sizes == [1]


def test_requests_that_arrive_together_run_together() -> None:
    rig = rig_of(batching_config())
    answers = [rig.send(1), rig.send(2, 3)]
    rig.run_all()
    assert rig.instance.sizes == [2]
    assert [answer.values() for answer in answers] == [[[1]], [[2, 3]]]


def test_requests_wait_while_the_instance_is_busy_and_then_run_together() -> None:
    rig = rig_of(batching_config())
    rig.send(0)
    rig.clock.run_soon()
    for value in (1, 2, 3):
        rig.send(value)
    assert rig.scheduler.num_pending == 3
    rig.run_all()
    assert rig.instance.sizes == [1, 3]


def test_a_batch_never_has_more_rows_than_the_model_takes() -> None:
    rig = rig_of(batching_config(max_batch_size=4))
    for rows in ((1, 1, 1), (2, 2), (3, 3, 3, 3)):
        rig.send(*rows)
    rig.run_all()
    assert rig.instance.sizes == [1, 1, 1]


def test_a_delay_holds_an_incomplete_batch_although_the_instance_is_idle() -> None:
    rig = rig_of(batching_config("max_queue_delay_microseconds: 300"))
    rig.send(1)
    rig.clock.advance(us=299)
    assert rig.waiting_sizes == []
    rig.send(2)
    rig.clock.advance(us=1)
    assert rig.waiting_sizes == [2]


def test_a_preferred_size_ends_the_delay() -> None:
    rig = rig_of(batching_config("preferred_batch_size: [2] max_queue_delay_microseconds: 300"))
    rig.send(1)
    rig.clock.run_soon()
    rig.send(2)
    rig.clock.run_soon()
    assert rig.waiting_sizes == [2]
    assert rig.clock.num_timers == 0


def test_another_shape_ends_the_delay_and_starts_its_own_batch() -> None:
    rig = rig_of(batching_config("max_queue_delay_microseconds: 300", dims="-1"))
    rig.submit(request_of(np.zeros((1, 3), np.int32)))
    rig.submit(request_of(np.zeros((1, 3), np.int32)))
    rig.submit(request_of(np.zeros((1, 5), np.int32)))
    rig.clock.run_soon()
    assert rig.waiting_sizes == [2]
    rig.instance.step()
    rig.clock.advance(us=300)
    assert rig.waiting_sizes == [1]


def test_two_instances_run_side_by_side() -> None:
    rig = rig_of(batching_config(max_batch_size=1), num_instances=2)
    for value in (1, 2, 3):
        rig.send(value)
    rig.clock.run_soon()
    assert [instance.sizes for instance in rig.instances] == [[1], [1]]
    assert rig.scheduler.num_pending == 1


def test_an_instance_that_is_not_available_gets_nothing_until_it_is_back() -> None:
    rig = rig_of(PLAIN)
    rig.instance.available = False
    rig.send(1)
    assert rig.waiting_sizes == []
    rig.instance.available = True
    rig.scheduler.set_instances(rig.instances)
    assert rig.waiting_sizes == [1]


def test_preserved_order_holds_an_early_answer_back() -> None:
    rig = rig_of(batching_config("preserve_ordering: true", max_batch_size=1), num_instances=2)
    first, second = rig.send(1), rig.send(2)
    rig.clock.run_soon()
    rig.instances[1].step()
    assert not second.responses
    rig.instances[0].step()
    assert first.values() == [[1]]
    assert second.values() == [[2]]


def test_a_full_queue_rejects_at_once() -> None:
    rig = rig_of(batching_config("default_queue_policy { max_queue_size: 2 }", max_batch_size=1))
    rig.send(0)
    rig.clock.run_soon()
    rig.send(1)
    rig.send(2)
    with pytest.raises(Unavailable, match=r"^\[request id: r4\] Exceeds maximum queue size$"):
        rig.send(3, id="r4")


def test_a_burst_is_not_refused_for_a_queue_that_an_idle_instance_would_empty() -> None:
    rig = rig_of(batching_config("default_queue_policy { max_queue_size: 1 }", max_batch_size=1))
    answers = [rig.send(0), rig.send(1)]
    with pytest.raises(Unavailable, match="Exceeds maximum queue size"):
        rig.send(2)
    rig.run_all()
    assert [answer.values() for answer in answers] == [[[0]], [[1]]]


def test_a_request_that_waits_too_long_is_refused_when_its_time_is_up() -> None:
    policy = "default_timeout_microseconds: 3000000 allow_timeout_override: true"
    rig = rig_of(batching_config(f"default_queue_policy {{ {policy} }}", max_batch_size=1))
    rig.send(0)
    rig.clock.run_soon()
    patient, hasty = rig.send(1), rig.send(2, timeout_us=100_000)
    rig.clock.advance(ms=99)
    assert not hasty.responses
    rig.clock.advance(ms=1)
    assert hasty.error == "Request timeout expired"
    rig.run_all()
    assert patient.values() == [[1]]


@pytest.mark.parametrize(
    "policy",
    ["default_timeout_microseconds: 5000", "default_timeout_microseconds: 0 allow_timeout_override: true"],
)
def test_a_request_may_only_shorten_a_timeout_that_may_be_overridden(policy: str) -> None:
    rig = rig_of(batching_config(f"default_queue_policy {{ {policy} }}", max_batch_size=1))
    rig.send(0)
    rig.clock.run_soon()
    answers = rig.send(1, timeout_us=1000)
    rig.clock.advance(us=4999)
    assert not answers.responses


def test_a_deadline_refuses_a_queued_request() -> None:
    rig = rig_of(PLAIN)
    rig.send(0)
    answers = rig.send(1, deadline_ns=rig.clock.now_ns() + 2_000_000)
    rig.clock.advance(ms=2)
    assert answers.error == "Request timeout expired"


def test_delayed_requests_run_after_the_others_of_their_level() -> None:
    policy = "timeout_action: DELAY default_timeout_microseconds: 50000"
    rig = rig_of(batching_config(f"default_queue_policy {{ {policy} }}", max_batch_size=1))
    rig.send(0)
    rig.clock.run_soon()
    late = rig.send(1)
    rig.clock.advance(ms=60)
    rig.send(2)
    rig.run_all()
    assert [batch[0].inputs["X"].numpy().item() for batch in rig.observer.batches] == [0, 2, 1]
    assert late.is_final


def test_urgent_levels_run_first_and_unknown_ones_count_as_default() -> None:
    rig = rig_of(batching_config("priority_levels: 3 default_priority_level: 2", max_batch_size=1))
    rig.send(0)
    rig.clock.run_soon()
    for value, priority in ((1, 3), (2, 9), (3, 0), (4, 1)):
        rig.send(value, priority=priority)
    rig.run_all()
    assert [batch[0].inputs["X"].numpy().item() for batch in rig.observer.batches] == [0, 4, 2, 3, 1]


def test_each_level_has_its_own_policy() -> None:
    batching = """priority_levels: 2 default_priority_level: 1
        priority_queue_policy { key: 2 value { max_queue_size: 1 } }"""
    rig = rig_of(batching_config(batching, max_batch_size=1))
    rig.send(0)
    rig.clock.run_soon()
    rig.send(1, priority=2)
    rig.send(2, priority=1)
    with pytest.raises(Unavailable):
        rig.send(3, priority=2)


def test_cancelling_a_queued_request_takes_it_out() -> None:
    rig = rig_of(batching_config())
    rig.send(0)
    rig.clock.run_soon()
    gone, stays = rig.send(1), rig.send(2)
    gone.request.cancel()
    assert isinstance(gone.responses[0].error, Cancelled)
    assert rig.scheduler.num_pending == 1
    rig.run_all()
    assert stays.values() == [[2]]
    assert rig.instance.sizes == [1, 1]


def test_cancelling_a_running_request_tells_its_instance() -> None:
    rig = rig_of(PLAIN)
    answers = rig.send(1)
    answers.request.cancel()
    assert rig.instance.cancelled == [answers.request]
    assert not answers.responses
    rig.run_all()
    assert answers.is_final


def test_cancelling_an_answered_request_does_nothing() -> None:
    rig = rig_of(PLAIN)
    answers = rig.send(1)
    rig.run_all()
    answers.request.cancel()
    assert len(answers.responses) == 1


def test_close_fails_what_waits_and_refuses_what_comes() -> None:
    rig = rig_of(PLAIN)
    running, waiting = rig.send(1), rig.send(2)
    rig.scheduler.close()
    assert isinstance(waiting.responses[0].error, Unavailable)
    with pytest.raises(Unavailable, match="stopped accepting"):
        rig.send(3)
    rig.run_all()
    assert running.values() == [[1]]
    assert rig.clock.num_timers == 0


@pytest.mark.asyncio
async def test_drain_returns_with_the_last_answer() -> None:
    rig = rig_of(PLAIN)
    rig.send(1)
    rig.send(2)
    draining = asyncio.ensure_future(rig.scheduler.drain())
    await asyncio.sleep(0)
    rig.instance.step()
    await asyncio.sleep(0)
    assert not draining.done()
    rig.instance.step()
    await draining
    assert rig.scheduler.num_in_flight == 0
    await rig.scheduler.drain()


def test_a_failing_batch_frees_its_instance() -> None:
    rig = rig_of(PLAIN)
    failed, next_one = rig.send(1), rig.send(2)
    rig.instance.fail("model went wrong")
    assert failed.error == "model went wrong"
    rig.run_all()
    assert next_one.values() == [[2]]


def test_the_first_batch_can_be_held_until_enough_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSERVER_DELAY_SCHEDULER", "3")
    rig = rig_of(batching_config())
    rig.send(1)
    rig.send(2)
    rig.clock.advance(s=1)
    assert rig.waiting_sizes == []
    rig.send(3)
    rig.clock.run_soon()
    assert rig.waiting_sizes == [3]
    rig.run_all()
    rig.send(4)
    rig.run_all()
    assert rig.instance.sizes == [3, 1]


def test_requests_that_were_cancelled_meanwhile_count_for_the_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSERVER_DELAY_SCHEDULER", "2")
    rig = rig_of(batching_config())
    rig.send(1).request.cancel()
    rig.send(2)
    rig.run_all()
    assert rig.instance.sizes == [1]
