"""The dynamic batcher's loop over random arrivals, cancellations, timeouts and failures: nobody is forgotten."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from enginehouse.errors import Unavailable

from .factories import Answers, batching_config, request_of, rig_of

MAX_ROWS = 4
MAX_QUEUED = 6
DELAY_US = 40
BATCHING = f"""
max_queue_delay_microseconds: {DELAY_US} preferred_batch_size: [ 2, 4 ] priority_levels: 2 default_priority_level: 2
default_queue_policy {{
  max_queue_size: {MAX_QUEUED} default_timeout_microseconds: 200 allow_timeout_override: true
}}
"""


class DynamicBatcher(RuleBasedStateMachine):
    """Each request carries its number in every row, and gets it back or an error that fits what befell it."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = rig_of(batching_config(BATCHING, MAX_ROWS, dims="-1"), num_instances=2)
        self.sent: list[Answers] = []
        self.num_failed_batches = 0

    @rule(
        rows=st.integers(1, MAX_ROWS),
        width=st.integers(1, 2),
        priority=st.integers(0, 2),
        timeout_us=st.sampled_from([0, 30]),
    )
    def send(self, rows: int, width: int, priority: int, timeout_us: int) -> None:
        array = np.full((rows, width), len(self.sent), np.int32)
        request = request_of(array, priority=priority, timeout_us=timeout_us)
        try:
            self.sent.append(self.rig.submit(request))
        except Unavailable:
            assert self.rig.scheduler.num_pending >= MAX_QUEUED

    @rule()
    def the_loop_turns(self) -> None:
        self.rig.clock.run_soon()

    @rule(us=st.sampled_from([10, DELAY_US, 250]))
    def time_passes(self, us: int) -> None:
        self.rig.clock.advance(us=us)

    @precondition(lambda self: any(instance.waiting for instance in self.rig.instances))
    @rule(fails=st.booleans(), data=st.data())
    def a_batch_ends(self, fails: bool, data: st.DataObject) -> None:
        instance = data.draw(st.sampled_from([one for one in self.rig.instances if one.waiting]))
        if fails:
            instance.fail("broke")
        else:
            instance.step()

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.sent)).request.cancel()

    @invariant()
    def batches_are_of_one_shape_and_not_too_large(self) -> None:
        for instance in self.rig.instances:
            for batch in instance.waiting:
                assert sum(request.num_rows for request in batch.requests) <= MAX_ROWS
                assert len({request.inputs["X"].shape[1] for request in batch.requests}) == 1

    @invariant()
    def every_request_is_waiting_running_or_answered(self) -> None:
        num_running = sum(len(batch.requests) for instance in self.rig.instances for batch in instance.waiting)
        num_open = sum(not answers.is_final for answers in self.sent)
        assert self.rig.scheduler.num_pending + num_running == num_open == self.rig.scheduler.num_in_flight

    def teardown(self) -> None:
        self.rig.clock.advance(us=10 * DELAY_US)
        self.rig.run_all()
        assert self.rig.scheduler.num_in_flight == 0
        for number, answers in enumerate(self.sent):
            assert len(answers.responses) == 1
            if answers.error:
                assert answers.error in ("broke", "Request timeout expired", "Request cancelled")
            else:
                assert {value for row in answers.values() for value in row} == {number}


TestDynamicBatcher = DynamicBatcher.TestCase
TestDynamicBatcher.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
