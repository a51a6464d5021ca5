"""Tenants share a model's time by weight, whatever each of them asks for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.errors import Unavailable
from enginehouse.scheduling.dynamic_batching import Cut, DynamicBatching
from enginehouse.scheduling.fairness import FairQueue, Tenant
from enginehouse.scheduling.queue import QueuePolicy, Ticket
from enginehouse.types import InferRequest

from .factories import batching_config, rig_of


def ticket_of(tenant: str, cost: int = 1, priority: int = 0) -> Ticket:
    ticket = Ticket(InferRequest("m", tenant=tenant, batch_size=1, priority=priority), 0)
    ticket.length = cost
    return ticket


def queue_of(**weights: float) -> FairQueue:
    return FairQueue([Tenant(name, weight) for name, weight in weights.items()])


def serve(queue: FairQueue, num_requests: int) -> Counter[str]:
    """Cost that each tenant was served when so many requests are cut one by one."""
    served: Counter[str] = Counter()
    for _ in range(num_requests):
        ticket = next(iter(queue))
        queue.cut((ticket,))
        served[ticket.request.tenant] += ticket.rows * ticket.length
    return served


def test_equal_tenants_take_turns_whoever_asks_more() -> None:
    queue = queue_of(a=1, b=1)
    for tenant in "aaaaaaaabb":
        queue.add(ticket_of(tenant))
    order = [ticket.request.tenant for ticket in queue]
    assert "".join(order) == "abab" + "a" * 6


def test_shares_follow_the_weights() -> None:
    queue = queue_of(a=3, b=1)
    for _ in range(100):
        queue.add(ticket_of("a"))
        queue.add(ticket_of("b"))
    assert serve(queue, 80) == {"a": 60, "b": 20}


def test_shares_are_of_cost_and_not_of_requests() -> None:
    queue = queue_of(short=1, long=1)
    for _ in range(100):
        queue.add(ticket_of("short", cost=10))
        queue.add(ticket_of("long", cost=90))
    served = serve(queue, 100)
    assert abs(served["short"] - served["long"]) <= 90


def test_a_pause_is_not_saved_up() -> None:
    queue = queue_of(a=1, b=1)
    for _ in range(50):
        queue.add(ticket_of("a"))
    serve(queue, 40)
    for _ in range(10):
        queue.add(ticket_of("b"))
    assert serve(queue, 10) == {"a": 5, "b": 5}


def test_tenants_that_the_config_does_not_name_share_one_part() -> None:
    queue = queue_of(known=1)
    for number in range(20):
        queue.add(ticket_of("known"))
        queue.add(ticket_of(f"stranger {number}"))
    assert serve(queue, 20)["known"] == 10


def test_more_urgent_levels_still_come_first() -> None:
    queue = FairQueue([Tenant("a"), Tenant("b")], [QueuePolicy(), QueuePolicy()], 1)
    for tenant, priority in (("a", 2), ("b", 2), ("b", 1)):
        queue.add(ticket_of(tenant, priority=priority))
    assert [ticket.request.priority for ticket in queue] == [1, 2, 2]


def test_a_tenants_own_priority_is_for_requests_without_one() -> None:
    queue = FairQueue([Tenant("vip", priority=1)], [QueuePolicy(), QueuePolicy()], 1)
    queue.add(ticket_of("other"))
    queue.add(ticket_of("vip"))
    assert [ticket.request.tenant for ticket in queue] == ["vip", "other"]


def test_a_batch_is_made_of_the_fair_order() -> None:
    queue = queue_of(a=1, b=1)
    for tenant in "aaaab":
        queue.add(ticket_of(tenant))
    decision = DynamicBatching(2).decide(queue, 0)
    assert isinstance(decision, Cut)
    assert [ticket.request.tenant for ticket in decision.tickets] == ["a", "b"]


def test_a_tenants_own_queue_is_bounded() -> None:
    queue = FairQueue([Tenant("a", max_waiting=2)])
    queue.add(ticket_of("a"))
    queue.add(ticket_of("a"))
    with pytest.raises(Unavailable, match="Exceeds maximum queue size of tenant 'a'"):
        queue.add(ticket_of("a"))
    queue.add(ticket_of("b"))


@settings(max_examples=40)
@given(
    arrivals=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20)), min_size=20, max_size=50),
    weights=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)
def test_no_tenant_is_ahead_of_another_that_waits_by_more_than_one_request(
    arrivals: list[tuple[str, int]], weights: tuple[int, int, int]
) -> None:
    queue = queue_of(**{name: float(weight) for name, weight in zip("abc", weights, strict=True)})
    waiting: Counter[str] = Counter()
    for tenant, cost in arrivals:
        queue.add(ticket_of(tenant, cost))
        waiting[tenant] += 1
    served: Counter[str] = Counter()
    weight_of = dict(zip("abc", weights, strict=True))
    while all(waiting[name] for name in waiting):
        ticket = next(iter(queue))
        queue.cut((ticket,))
        tenant = ticket.request.tenant
        waiting[tenant] -= 1
        served[tenant] += ticket.length
        shares = [served[name] / weight_of[name] for name in waiting]
        assert max(shares) - min(shares) <= 20


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["add", "cut", "take", "finish"]), st.sampled_from("abc")), max_size=80))
def test_nothing_is_lost_or_given_out_twice(steps: list[tuple[str, str]]) -> None:
    queue = FairQueue([Tenant("a", max_in_work=2), Tenant("b", 2.0)])
    waiting: list[Ticket] = []
    in_work: list[Ticket] = []
    for step, name in steps:
        mine = [ticket for ticket in waiting if ticket.request.tenant == name]
        if step == "add":
            waiting.append(ticket_of(name))
            queue.add(waiting[-1])
        elif step == "cut" and (ticket := next(iter(queue), None)) is not None:
            queue.cut((ticket,))
            waiting.remove(ticket)
            in_work.append(ticket)
        elif step == "take" and mine:
            queue.take((mine[-1],))
            waiting.remove(mine[-1])
        elif step == "finish" and in_work:
            queue.finished(in_work.pop(0).request)
        given_out = list(queue)
        assert len(given_out) == len(set(given_out))
        assert set(given_out) <= set(waiting)
        blocked = {ticket.request.tenant for ticket in set(waiting) - set(given_out)}
        assert blocked <= {"a"}
        assert queue.num_requests == len(waiting)
        assert sum(ticket.request.tenant == "a" for ticket in in_work) <= 2


def test_a_tenant_with_enough_in_work_waits_although_an_instance_is_free() -> None:
    config = batching_config(max_batch_size=1)
    config.serving.tenants.add(name="a", max_inflight=1)
    rig = rig_of(config, num_instances=3)
    for tenant in ("a", "a", "b"):
        rig.send(1, tenant=tenant)
    rig.clock.run_soon()
    assert rig.waiting_sizes == [1, 1]
    rig.instances[0].step()
    rig.clock.run_soon()
    assert rig.waiting_sizes == [1, 1]
