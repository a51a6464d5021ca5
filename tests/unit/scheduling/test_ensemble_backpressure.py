"""Full steps of an ensemble hold back what feeds them, and everything goes on in the end."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from enginehouse.scheduling.ensemble import ANSWERS_AHEAD, EnsembleScheduler
from enginehouse.types import InferRequest, InferResponse

from .factories import Answers
from .test_ensemble import DOUBLE, SmallCore, ensemble, member, step

LIMIT = 2
DECOUPLED = "model_transaction_policy { decoupled: true }"
SPLIT = member("split", "A", "P", extra=DECOUPLED)
STREAM = ensemble(
    "IN",
    "OUT",
    step("split", {"A": "IN"}, {"P": "part"}),
    step("double", {"A": "part"}, {"B": "twice"}),
    step("single", {"A": "twice"}, {"P": "OUT"}),
    extra=f"max_inflight_requests: {LIMIT}",
)
STREAM.model_transaction_policy.decoupled = True
PARTS = 3


def waiting_of(core: SmallCore, model: str) -> list[InferRequest]:
    return [request for request in core.waiting if request.model_name == model]


def may_answer(request: InferRequest) -> bool:
    return not request.max_ahead or request.num_responses - request.num_taken < request.max_ahead


def give_part(core: SmallCore, request: InferRequest, value: int) -> None:
    request.num_responses += 1
    core.reply(request, final=False, P=np.array([[value]]))


def test_a_decoupled_step_waits_until_its_consumers_take_its_answers() -> None:
    core = SmallCore(STREAM, SPLIT, DOUBLE, member("single", "A", "P"))
    core.send(IN=[[1]])
    [producer] = core.waiting
    num_given = 0
    while may_answer(producer):
        give_part(core, producer, num_given)
        num_given += 1
    assert num_given == LIMIT + ANSWERS_AHEAD
    core.answer(waiting_of(core, "double")[0])
    assert may_answer(producer)


def test_a_finished_step_keeps_its_place_until_the_next_one_has_room() -> None:
    config = ensemble(
        "IN",
        "OUT",
        step("double", {"A": "IN"}, {"B": "mid"}),
        step("single", {"A": "mid"}, {"P": "OUT"}),
        extra="max_inflight_requests: 1",
    )
    core = SmallCore(config, DOUBLE, member("single", "A", "P"))
    answers = [core.send(IN=[[value]]) for value in range(3)]
    core.answer(waiting_of(core, "double")[0])
    core.answer(waiting_of(core, "double")[0])
    assert [request.model_name for request in core.waiting] == ["single"]  # the third still waits as it came
    core.run_all()
    assert [one.values("OUT") for one in answers] == [[[0]], [[2]], [[4]]]


def test_a_step_that_leads_back_to_its_own_model_is_not_held() -> None:
    many = member("many", "A", "B", extra=DECOUPLED)
    config = ensemble(
        "IN",
        "OUT",
        step("many", {"A": "IN"}, {"B": "mid"}),
        step("many", {"A": "mid"}, {"B": "OUT"}),
        extra="max_inflight_requests: 1",
    )
    config.model_transaction_policy.decoupled = True
    core = SmallCore(config, many)
    core.send(IN=[[1]])
    assert core.waiting[0].max_ahead == 0


def test_an_ensemble_inside_another_passes_the_holding_back_on() -> None:
    core = SmallCore(STREAM, SPLIT, DOUBLE, member("single", "A", "P"))
    answers = core.send(IN=[[1]])
    answers.request.max_ahead = 1  # as if it were a step of a larger one
    [producer] = core.waiting
    give_part(core, producer, 1)
    core.answer(waiting_of(core, "double")[0])
    core.answer(waiting_of(core, "single")[0])
    give_part(core, producer, 2)
    core.answer(waiting_of(core, "double")[0])
    core.answer(waiting_of(core, "single")[0])
    give_part(core, producer, 3)
    core.answer(waiting_of(core, "double")[0])
    assert not waiting_of(core, "single"), "both places are kept by answers that nobody has taken"
    answers.request.took_answer()
    assert waiting_of(core, "single")
    producer.num_responses += 1
    core.respond(producer, InferResponse(has_response=False))
    core.run_all()
    assert answers.values("OUT") == [[2], [4], [6]]


class Backpressure(RuleBasedStateMachine):
    """Producers that answer as soon as they may, consumers that answer when the test lets them."""

    def __init__(self) -> None:
        super().__init__()
        self.core = SmallCore(STREAM, SPLIT, DOUBLE, member("single", "A", "P"))
        self.sent: list[Answers] = []
        self.given: dict[InferRequest, int] = {}

    def producers(self) -> list[InferRequest]:
        return [request for request in waiting_of(self.core, "split") if may_answer(request) or request.cancelled]

    @rule()
    def send(self) -> None:
        self.sent.append(self.core.send(IN=[[len(self.sent)]]))

    @precondition(lambda self: self.producers())
    @rule(data=st.data())
    def produce(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.producers()))
        self.produce_from(request)

    def produce_from(self, request: InferRequest) -> None:
        number = self.given[request] = self.given.get(request, 0) + 1
        if number > PARTS or request.cancelled:
            self.core.respond(request, InferResponse(has_response=False))
        else:
            give_part(self.core, request, number)

    def consumers(self) -> list[InferRequest]:
        return [request for request in self.core.waiting if request.model_name != "split"]

    @precondition(lambda self: self.consumers())
    @rule(data=st.data())
    def consume(self, data: st.DataObject) -> None:
        self.core.answer(data.draw(st.sampled_from(self.consumers())))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.sent)).request.cancel()

    @invariant()
    def no_step_is_over_its_limit(self) -> None:
        for model in ("split", "double", "single"):
            assert len(waiting_of(self.core, model)) <= LIMIT

    @invariant()
    def what_waits_is_bounded(self) -> None:
        scheduler = self.core.scheduler
        assert isinstance(scheduler, EnsembleScheduler)
        for consumer in (1, 2):
            alive = LIMIT * ANSWERS_AHEAD
            cancelled = PARTS * sum(answers.request.cancelled for answers in self.sent)
            assert scheduler.gate.num_waiting(consumer) <= alive + cancelled

    def teardown(self) -> None:
        while self.core.waiting:
            waiting = list(self.core.waiting)
            given = sum(self.given.values())
            for request in waiting:
                if request not in self.core.waiting:
                    continue
                if request.model_name != "split":
                    self.core.answer(request)
                elif may_answer(request) or request.cancelled:
                    self.produce_from(request)
            self.core.clock.run_soon()
            assert (self.core.waiting, sum(self.given.values())) != (waiting, given), "nobody can go on"
        for answers in self.sent:
            assert answers.is_final
            if not answers.request.cancelled:
                assert sorted(answers.values("OUT")) == [[2 * part] for part in range(1, PARTS + 1)]
        assert self.core.scheduler.num_in_flight == 0


TestBackpressure = Backpressure.TestCase
TestBackpressure.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
