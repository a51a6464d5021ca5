"""What the LLM scheduler decides in the situations that matter, one at a time."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from enginehouse.config.schema import ModelConfig
from enginehouse.types import SamplingParameters
from enginehouse_backends.llm.block_pool import BlockPool, root_hash
from enginehouse_backends.llm.generation import Generation, GenerationState
from enginehouse_backends.llm.kv_space import KvSpace
from enginehouse_backends.llm.latency_model import LatencyModel
from enginehouse_backends.llm.page_ledger import PageLedger
from enginehouse_backends.llm.prompt_policy import PromptPolicy
from enginehouse_backends.llm.scheduler import Scheduler, SchedulerLimits, StepPlan
from enginehouse_backends.llm.waiting_queue import WaitingQueue, tenant_weights


def make_scheduler(num_pages: int = 16, blocks_per_page: int = 4, **limits: Any) -> Scheduler:
    space = KvSpace(PageLedger(num_pages))
    pool = BlockPool(blocks_per_page)
    space.join("m", pool)
    settings = {"block_size": 4, "max_running": 8, "max_batched_tokens": 32, "min_chunk_tokens": 1, **limits}
    return Scheduler("m", pool, space, SchedulerLimits(**settings))


def make_generation(name: str, num_prompt: int = 8, max_total: int = 40, **fields: Any) -> Generation:
    start = sum(name.encode()) * 1000
    tokens = fields.pop("tokens", range(start, start + num_prompt))
    return Generation(
        name, array("i", tokens), len(tokens), SamplingParameters(), max_total, root=root_hash("m"), **fields
    )


def run(scheduler: Scheduler, append: bool = True) -> StepPlan:
    """One step; everyone who may gets token 7."""
    plan = scheduler.plan(now_ns=scheduler.step)
    for generation, _ in plan.shares:
        if append and generation.num_left == 0:
            generation.tokens.append(7)
    return plan


def shares(plan: StepPlan) -> dict[str, int]:
    return {generation.id: count for generation, count in plan.shares}


def test_prompts_are_cut_into_chunks_and_then_decode() -> None:
    scheduler = make_scheduler(max_batched_tokens=10)
    scheduler.add(make_generation("a", num_prompt=24))
    assert [shares(run(scheduler)) for _ in range(5)] == [{"a": 10}, {"a": 10}, {"a": 4}, {"a": 1}, {"a": 1}]


def test_decoding_goes_on_beside_a_prompt() -> None:
    scheduler = make_scheduler(max_batched_tokens=10, target_itl_s=1.0)
    scheduler.add(make_generation("a"))
    run(scheduler)
    scheduler.add(make_generation("b", num_prompt=24))
    assert shares(run(scheduler)) == {"a": 1, "b": 9}


def test_a_latency_target_bounds_the_chunk() -> None:
    scheduler = make_scheduler(target_itl_s=0.05)
    scheduler.latency.observe(1, 0, 0.02)
    scheduler.latency.observe(1, 20, 0.02 + 20 * 0.005)
    scheduler.add(make_generation("a"))
    run(scheduler)
    scheduler.add(make_generation("b", num_prompt=24))
    assert shares(run(scheduler)) == {"a": 1, "b": 6}


def test_requests_of_one_step_share_a_prefix() -> None:
    scheduler = make_scheduler()
    first, second = (make_generation(name, tokens=[*range(8), tail]) for name, tail in (("a", 1), ("b", 2)))
    scheduler.add(first)
    scheduler.add(second)
    plan = run(scheduler)
    assert shares(plan) == {"a": 9, "b": 1}
    assert second.num_cached == 8
    assert second.blocks[:2] == first.blocks[:2]


def test_who_shares_a_prefix_waits_while_it_is_computed() -> None:
    scheduler = make_scheduler(max_batched_tokens=10)
    scheduler.add(make_generation("a", tokens=range(24)))
    scheduler.add(make_generation("b", tokens=[*range(20), 99]))
    scheduler.add(make_generation("c", num_prompt=4))
    assert [shares(run(scheduler)) for _ in range(3)] == [{"a": 10}, {"a": 10}, {"a": 4, "b": 1, "c": 4}]


def test_a_whole_prompt_in_the_cache_still_computes_its_last_token() -> None:
    scheduler = make_scheduler()
    first = make_generation("a", num_prompt=8)
    scheduler.add(first)
    run(scheduler)
    scheduler.finish(first)
    second = make_generation("a", num_prompt=8)
    scheduler.add(second)
    assert shares(run(scheduler)) == {"a": 4}
    assert second.num_cached == 4


def test_cancelling_frees_every_block() -> None:
    scheduler = make_scheduler()
    generation = make_generation("a", num_prompt=20)
    scheduler.add(generation)
    run(scheduler)
    scheduler.finish(generation)
    assert scheduler.pool.num_live == 0
    assert not scheduler.has_work
    scheduler.check_integrity()


def test_the_latest_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_pages=2, blocks_per_page=3)
    scheduler.expected_output = 0
    for name in ("a", "b"):
        scheduler.add(make_generation(name, num_prompt=7, max_total=24))
    preempted: list[str] = []
    while not preempted:
        preempted = [generation.id for generation in run(scheduler).preempted]
    scheduler.add(make_generation("late"))
    assert preempted == ["b"]
    assert [generation.id for generation in scheduler.waiting.in_order()] == ["b", "late"]


def test_lower_numbers_run_first_and_take_the_place_of_others() -> None:
    scheduler = make_scheduler(max_running=1)
    slow = make_generation("slow", priority=5)
    scheduler.add(slow)
    run(scheduler)
    scheduler.add(make_generation("urgent", priority=0))
    plan = run(scheduler)
    assert [generation.id for generation in plan.preempted] == ["slow"]
    assert [generation.id for generation in scheduler.running] == []
    assert shares(run(scheduler)) == {"urgent": 8}
    assert slow.state is GenerationState.WAITING


def test_admission_counts_what_runners_will_still_need() -> None:
    scheduler = make_scheduler(num_pages=2, blocks_per_page=4)
    scheduler.expected_output = 16
    scheduler.add(make_generation("a", num_prompt=8))
    scheduler.add(make_generation("b", num_prompt=8))
    assert shares(run(scheduler)) == {"a": 8}, "8 blocks: a is expected to need 6 of them"


def test_a_failed_steps_blocks_are_not_found() -> None:
    scheduler = make_scheduler()
    generation = make_generation("a", num_prompt=9)
    scheduler.add(generation)
    plan = scheduler.plan(0)
    scheduler.roll_back(plan)
    scheduler.finish(generation)
    again = make_generation("a", num_prompt=9)
    scheduler.add(again)
    run(scheduler)
    assert again.num_cached == 0


def test_tenants_with_less_service_go_first() -> None:
    config = ModelConfig()
    config.serving.tenants.add(name="gold", weight=4)
    config.serving.tenants.add(name="*", weight=2)
    waiting = WaitingQueue(weights=tenant_weights(config))
    for name in ("a1", "a2", "b1", "gold1", "gold2"):
        waiting.add(make_generation(name, tenant=name.rstrip("12")))
    order = []
    for generation in waiting.in_order():
        order.append(generation.id)
        waiting.charge(generation.tenant, 10)
    assert order == ["a1", "b1", "gold1", "gold2", "a2"]


def test_a_tenant_cannot_save_up_service() -> None:
    waiting = WaitingQueue()
    waiting.add(make_generation("a1", tenant="a"))
    waiting.charge("a", 1000)
    late = make_generation("b1", tenant="b")
    waiting.add(late)
    waiting.charge("b", 1)
    waiting.add(make_generation("a2", tenant="a"))
    assert [generation.id for generation in waiting.in_order()] == ["a1", "a2", "b1"]


def make_latency(base_s: float = 0.02, token_s: float = 0.001) -> LatencyModel:
    latency = LatencyModel()
    latency.observe(4, 0, base_s)
    latency.observe(4, 100, base_s + 100 * token_s)
    return latency


def decoding(*outputs: int) -> list[Generation]:
    generations = [make_generation(str(index)) for index in range(len(outputs))]
    for generation, count in zip(generations, outputs, strict=True):
        generation.tokens.extend([1] * count)
    return generations


@pytest.mark.parametrize(
    ("outputs", "backlog", "target_s", "stalls"),
    [
        ((1, 1), 2000, 0.0, True),
        ((1, 50), 2000, 0.0, False),
        ((1, 100), 2000, 0.0, True),
        ((1, 1), 60, 0.0, False),
        ((1, 1), 2000, 0.05, False),
        ((), 2000, 0.0, False),
    ],
)
def test_a_burst_stalls_only_those_who_can_bear_it(
    outputs: tuple[int, ...], backlog: int, target_s: float, stalls: bool
) -> None:
    policy = PromptPolicy(512, 16, target_s)
    assert policy.may_stall(decoding(*outputs), backlog, make_latency()) is stalls


def test_a_stall_ends_and_does_not_come_back_soon() -> None:
    policy, latency, running = PromptPolicy(512, 16, 0.0), make_latency(), decoding(1, 1)
    for _ in range(8):
        assert policy.may_stall(running, 9999, latency)
        policy.on_stall(running, 512)
    assert not policy.may_stall(running, 9999, latency), "4096 tokens are enough"
    policy.on_decode()
    for generation in running:
        generation.tokens.extend([1] * 99)
    assert not policy.may_stall(running, 9999, latency)
    for generation in running:
        generation.tokens.append(1)
    assert policy.may_stall(running, 9999, latency)


def test_the_last_prompts_of_a_burst_come_in_one_step_if_nobody_has_waited_recently() -> None:
    policy, latency, running = PromptPolicy(512, 16, 0.0), make_latency(0.02, 0.001), decoding(1, 120)
    usual = policy.budget(2, latency)
    assert usual in (39, 40)
    assert policy.budget_beside(running, 30, latency) == usual, "it is enough"
    assert policy.budget_beside(running, 200, latency) == usual, "too many"
    assert [generation.stalled_at for generation in running] == [0, 0]
    assert policy.budget_beside(running, 70, latency) == 70
    assert [generation.stalled_at for generation in running] == [1, 120]
    running[0].tokens.append(1)
    assert policy.budget_beside(running, 70, latency) == usual, "they have just waited"
    assert PromptPolicy(512, 16, 0.05).budget_beside(decoding(1), 70, latency) < 70, "a target is kept"


def test_without_stalling_a_step_may_take_three_times_its_base() -> None:
    assert PromptPolicy(512, 16, 0.0).budget(4, make_latency(0.02, 0.001)) in (39, 40)
    assert PromptPolicy(512, 16, 0.0).budget(4, make_latency(0.02, 0.1)) == 16, "never less than the least chunk"
    assert PromptPolicy(512, 16, 0.0).budget(0, make_latency()) == 512
    assert PromptPolicy(512, 16, 0.0).budget(4, LatencyModel()) == 508, "nothing is known yet"


@pytest.mark.parametrize(("token_s", "budget"), [(0.0, 512), (0.0001, 2048), (0.0005, 1000), (0.01, 512)])
def test_a_step_of_prompts_alone_is_long_only_where_short_ones_are_not_worth_it(token_s: float, budget: int) -> None:
    latency = LatencyModel()
    latency.observe(0, 20, 9.0)  # too few to tell
    latency.observe(3, 400, 9.0)
    if token_s:
        latency.observe(0, 300, 300 * token_s)
    policy = PromptPolicy(2048, 16, 0.0, longest_s=0.5)
    assert policy.budget(0, latency) == policy.budget_alone(latency) == budget
    assert PromptPolicy(100, 16, 0.0, longest_s=0.5).budget_alone(latency) == 100, "no more than is allowed"
    assert PromptPolicy(2048, 16, 0.0).budget_alone(latency) == 2048, "no length is set"
    policy.others_wait = True
    assert policy.budget_alone(latency) == 512
