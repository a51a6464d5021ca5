"""Sequences at random: every request one final answer, every sum right, no slot lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from enginehouse.errors import InvalidArgument
from enginehouse.scheduling.sequence_loop import SequenceScheduler
from enginehouse.types import Array

from .factories import Answers, rig_of
from .test_sequences import STATE, sequence_config

IDS = st.integers(1, 5)


def running_sum(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    total = inputs["SUM_IN"] + inputs["X"]
    return {"X": total, "SUM_OUT": total}


class SequenceMachine(RuleBasedStateMachine):
    """Clients start, continue, end, cancel and vanish; instances run batches, stop and come back."""

    strategy: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        config = sequence_config(self.strategy, max_batch_size=2, extra=STATE % "")
        self.rig = rig_of(config, num_instances=2, function=running_sum)
        self.open: dict[int, list[tuple[int, Answers]]] = {}
        """What each running sequence has sent since its last START."""
        self.runs: list[list[tuple[int, Answers]]] = []
        self.sent: list[Answers] = []

    @rule(correlation_id=IDS, value=st.integers(1, 9), start=st.booleans(), end=st.booleans(), timeout=st.booleans())
    def send(self, correlation_id: int, value: int, start: bool, end: bool, timeout: bool) -> None:
        try:
            answers = self.rig.send(
                value, correlation_id=correlation_id, start=start, end=end, timeout_us=700_000 if timeout else 0
            )
        except InvalidArgument:
            assert not start
            self.open.pop(correlation_id, None)
            return
        self.sent.append(answers)
        if start:
            self.open[correlation_id] = []
            self.runs.append(self.open[correlation_id])
        self.open.setdefault(correlation_id, []).append((value, answers))
        if end:
            del self.open[correlation_id]

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.sent)).request.cancel()

    @rule(number=st.integers(0, 1))
    def run_a_batch(self, number: int) -> None:
        self.rig.clock.run_soon()
        if self.rig.instances[number].waiting:
            self.rig.instances[number].step()

    @rule(ms=st.sampled_from([1, 800, 3000]))
    def time_passes(self, ms: int) -> None:
        self.rig.clock.advance(ms=ms)

    @rule(number=st.integers(0, 1))
    def an_instance_restarts(self, number: int) -> None:
        instance = self.rig.instances[number]
        instance.available = False
        self.rig.scheduler.set_instances(self.rig.instances)
        while instance.waiting:
            instance.fail("host died")
        self.rig.clock.run_soon()
        assert not instance.waiting
        instance.available = True
        self.rig.scheduler.set_instances(self.rig.instances)

    @invariant()
    def answers_are_right_as_far_as_they_came(self) -> None:
        for run in self.runs:
            total = 0
            for value, answers in run:
                total += value
                if answers.is_final and not answers.error:
                    assert answers.values() == [[total]]
                elif answers.is_final:
                    break

    @invariant()
    def later_requests_are_not_answered_before_earlier_ones(self) -> None:
        for run in self.runs:
            answered = [answers.is_final for _, answers in run if not answers.error]
            assert answered == sorted(answered, reverse=True)

    @invariant()
    def counts_agree(self) -> None:
        waiting = sum(not answers.is_final for answers in self.sent)
        assert self.rig.scheduler.num_in_flight == waiting

    @invariant()
    def no_slot_is_held_by_a_sequence_that_is_over(self) -> None:
        scheduler = self.rig.scheduler
        assert isinstance(scheduler, SequenceScheduler)
        assert not any(sequence.is_over for sequence in scheduler._book.sequences)

    def teardown(self) -> None:
        for _ in range(20):
            self.rig.run_all()
            self.rig.clock.advance(s=6)
        assert all(answers.is_final for answers in self.sent)
        scheduler = self.rig.scheduler
        assert isinstance(scheduler, SequenceScheduler)
        book = scheduler._book
        free = defaultdict(list)
        for slot, _, lane in book._free:
            free[lane.index].append(slot)
        num_slots = 2 if self.strategy.startswith("direct") else 3
        assert [sorted(slots) for slots in free.values()] == [list(range(num_slots))] * 2
        assert not book.sequences
        assert not book.backlog
        assert self.rig.clock.num_timers == 0


class DirectMachine(SequenceMachine):
    strategy = "direct { max_queue_delay_microseconds: 500 minimum_slot_utilization: 0.9 }"


class OldestMachine(SequenceMachine):
    strategy = "oldest { max_candidate_sequences: 3 max_queue_delay_microseconds: 500 }"


for machine in (DirectMachine, OldestMachine):
    machine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestDirectMachine = DirectMachine.TestCase
TestOldestMachine = OldestMachine.TestCase
