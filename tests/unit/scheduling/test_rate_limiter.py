"""Named resources that the instances of several models share."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.scheduling.rate_limiter import ANY_DEVICE, GLOBAL, InstanceLimits, RateLimiter, device_number
from enginehouse.testing.instances import GatedInstance

from .factories import Rig, config_of, rig_of


def limited(*resources: tuple[str, int], priority: int = 1, is_global: bool = True) -> ModelConfig:
    parts = " ".join(
        f'resources {{ name: "{name}" count: {count} global: {str(is_global).lower()} }}' for name, count in resources
    )
    return config_of(
        f"""name: "m" max_batch_size: 1 input {{ name: "X" data_type: TYPE_INT32 dims: [1] }}
        instance_group {{ count: 1 kind: KIND_CPU rate_limiter {{ {parts} priority: {priority} }} }}"""
    )


def rigs(limiter: RateLimiter, *configs: ModelConfig) -> list[Rig]:
    return [rig_of(config, rate_limiter=limiter) for config in configs]


def test_a_resource_of_one_lets_one_model_run_at_a_time() -> None:
    first, second = rigs(RateLimiter(), limited(("slot", 1)), limited(("slot", 1)))
    first.send(1)
    second.send(2)
    assert (first.waiting_sizes, second.waiting_sizes) == ([1], [])
    first.instance.step()
    assert second.waiting_sizes == [1]


def test_models_with_other_resources_are_not_held_up() -> None:
    first, second, third = rigs(RateLimiter(), *[limited((name, 1)) for name in ("a", "a", "b")])
    for rig in (first, second, third):
        rig.send(1)
    assert [rig.waiting_sizes for rig in (first, second, third)] == [[1], [], [1]]


def test_without_an_explicit_limit_the_most_demanding_instance_can_just_run() -> None:
    limiter = RateLimiter()
    rigs(limiter, limited(("R", 2)), limited(("R", 5)))
    assert limiter.limit_of(("R", GLOBAL)) == 5


def test_a_limit_too_small_for_an_instance_fails_its_load() -> None:
    limiter = RateLimiter({("R", ANY_DEVICE): 3})
    with pytest.raises(InvalidArgument, match='Resource count for "R" is limited to 3'):
        limiter.limits_of(limited(("R", 4)), [GatedInstance()])


def test_once_one_resource_has_an_explicit_limit_there_is_nothing_of_others() -> None:
    limiter = RateLimiter({("R", ANY_DEVICE): 3})
    with pytest.raises(InvalidArgument, match=r'"S" is limited to 0 which .* the minimum required count is 2'):
        limiter.limits_of(limited(("R", 1), ("S", 2)), [GatedInstance()])


def test_an_unloaded_model_leaves_nothing_behind() -> None:
    limiter = RateLimiter()
    large, small = rigs(limiter, limited(("R", 5)), limited(("R", 1)))
    large.send(1)
    large.scheduler.close()
    assert limiter.available(("R", GLOBAL)) < 0  # its batch still runs
    large.instance.step()
    assert (limiter.limit_of(("R", GLOBAL)), limiter.available(("R", GLOBAL))) == (1, 1)
    small.scheduler.close()
    limiter.limits_of(limited(("R", 1), is_global=False), [GatedInstance()])


def test_instances_that_show_up_after_the_unload_claim_nothing() -> None:
    limiter = RateLimiter()
    [rig] = rigs(limiter, limited(("R", 5)))
    rig.scheduler.close()
    rig.scheduler.set_instances([GatedInstance()])
    assert limiter.limit_of(("R", GLOBAL)) == 0


def test_a_model_that_can_not_be_loaded_claims_nothing() -> None:
    limiter = RateLimiter()
    config = limited(("R", 5))
    config.sequence_batching.state.add(input_name="IN", output_name="OUT", dims=[1])
    with pytest.raises(InvalidArgument, match="has no data_type"):
        rigs(limiter, config)
    assert limiter.limit_of(("R", GLOBAL)) == 0


def test_a_model_that_waits_lets_others_through_when_it_is_unloaded() -> None:
    limiter = RateLimiter({("R", ANY_DEVICE): 2})
    small, large, other = rigs(limiter, limited(("R", 1)), limited(("R", 2)), limited(("R", 1)))
    for rig in (small, large, other):
        rig.send(1)
    large.scheduler.close()
    assert (large.waiting_sizes, other.waiting_sizes) == ([], [1])


def test_a_resource_is_global_or_of_a_device_but_not_both() -> None:
    limiter = RateLimiter()
    limiter.limits_of(limited(("R", 1)), [GatedInstance()])
    with pytest.raises(InvalidArgument, match="both global and device-specific"):
        limiter.limits_of(limited(("R", 1), is_global=False), [GatedInstance()])


def test_each_device_has_its_own_count_of_a_resource() -> None:
    limiter = RateLimiter({("R", ANY_DEVICE): 1, ("R", 1): 2})
    config = limited(("R", 1), is_global=False)
    instances = [GatedInstance(name=f"i{index}") for index in range(3)]
    instances[1].device = instances[2].device = "cuda:1"
    limits = limiter.limits_of(config, instances)
    assert [limits.acquire_one([instance]) is not None for instance in instances] == [True, True, True]
    assert limiter.available(("R", 0)) == 0
    assert limiter.available(("R", 1)) == 0


def test_a_priority_of_two_gets_half_the_turns() -> None:
    first, second = rigs(RateLimiter(), limited(("slot", 1)), limited(("slot", 1), priority=2))
    for value in range(30):
        first.send(value)
        second.send(value)
    for _ in range(30):
        rig = first if first.waiting_sizes else second
        rig.instance.step()
    assert (len(first.instance.sizes), len(second.instance.sizes)) in ((20, 10), (20, 11), (21, 10))


def test_a_large_claim_is_not_starved_by_small_ones() -> None:
    limiter = RateLimiter({("R", ANY_DEVICE): 2})
    small, large = rigs(limiter, limited(("R", 1)), limited(("R", 2)))
    other = rig_of(limited(("R", 1)), rate_limiter=limiter)
    small.send(1)
    large.send(1)
    other.send(1)
    assert (large.waiting_sizes, other.waiting_sizes) == ([], [])
    small.instance.step()
    assert large.waiting_sizes == [1]


def test_room_that_nobody_needs_any_more_goes_to_the_next() -> None:
    first, second, third = rigs(RateLimiter(), *[limited(("slot", 1))] * 3)
    first.send(1)
    gone = second.send(2)
    third.send(3)
    gone.request.cancel()
    first.instance.step()
    assert (second.waiting_sizes, third.waiting_sizes) == ([], [1])


def test_an_instance_that_leaves_gives_back_what_it_holds_when_it_is_done() -> None:
    first, second = rigs(RateLimiter(), limited(("slot", 1)), limited(("slot", 1)))
    first.send(1)
    second.send(2)
    leaving = first.instance
    first.scheduler.set_instances([])
    assert second.waiting_sizes == []
    leaving.step()
    assert second.waiting_sizes == [1]


def test_sequences_obey_it_too() -> None:
    config = limited(("slot", 1))
    config.sequence_batching.direct.SetInParent()
    first, second = rigs(RateLimiter(), config, config)
    for rig in (first, second):
        rig.send(1, correlation_id=1, start=True)
        rig.clock.run_soon()
    assert (first.waiting_sizes, second.waiting_sizes) == ([1], [])
    first.instance.step()
    assert second.waiting_sizes == [1]


def test_devices_without_a_number_count_as_the_first() -> None:
    assert [device_number(device) for device in ("cpu", "cuda:3", "model")] == [0, 3, 0]


class LimiterMachine(RuleBasedStateMachine):
    """Instances acquire and release at random: never more than there is, and nobody is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.limiter = RateLimiter({("A", ANY_DEVICE): 3, ("B", ANY_DEVICE): 2})
        self.needs = [[("A", 1)], [("A", 3)], [("A", 2), ("B", 1)], [("B", 2)], [("B", 1)]]
        self.wants = [0] * len(self.needs)
        self.running = [False] * len(self.needs)
        self.limits: list[InstanceLimits] = []
        self.instances = [GatedInstance(name=str(index)) for index in range(len(self.needs))]
        for index, needs in enumerate(self.needs):
            limits = self.limiter.limits_of(limited(*needs, priority=1 + index % 2), [self.instances[index]])
            limits.on_room = lambda index=index: self.look(index)  # type: ignore[misc]  # bound now
            self.limits.append(limits)

    def look(self, index: int) -> None:
        if not self.wants[index] or self.running[index]:
            return
        if self.limits[index].acquire_one([self.instances[index]]) is not None:
            self.running[index] = True
            self.wants[index] -= 1

    @rule(index=st.integers(0, 4))
    def ask(self, index: int) -> None:
        self.wants[index] += 1
        self.look(index)

    @rule(index=st.integers(0, 4))
    def give_up(self, index: int) -> None:
        self.wants[index] = 0

    @precondition(lambda self: any(self.running))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from([i for i, runs in enumerate(self.running) if runs]))
        self.running[index] = False
        self.look(index)
        self.limits[index].release(self.instances[index])

    @invariant()
    def no_resource_is_overdrawn_or_lost(self) -> None:
        for name, limit in (("A", 3), ("B", 2)):
            used = sum(
                count
                for needs, runs in zip(self.needs, self.running, strict=True)
                for resource, count in needs
                if runs and resource == name
            )
            assert used <= limit
            assert self.limiter.available((name, GLOBAL)) == limit - used

    @invariant()
    def somebody_runs_if_anybody_wants(self) -> None:
        assert any(self.running) or not any(self.wants)


LimiterMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestLimiterMachine = LimiterMachine.TestCase
