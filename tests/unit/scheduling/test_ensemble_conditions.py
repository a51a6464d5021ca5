"""Steps of an ensemble that run only if their condition holds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.scheduling.ensemble_check import check_ensemble
from enginehouse.scheduling.ensemble_graph import EnsembleGraph
from enginehouse.types import InferResponse

from .factories import config_of
from .test_ensemble import ADD_SUB, CHAIN, DOUBLE, SmallCore, ensemble, member, step, tensor

EITHER_OR = ensemble(
    "IN",
    "OUT",
    step("double", {"A": "IN"}, {"B": "OUT"}, when="max(IN) < 10"),
    step("copy", {"I": "IN"}, {"P": "OUT"}, when="max(IN) >= 10"),
)
COPY = member("copy", "I", "P")


def asked(core: SmallCore) -> list[str]:
    return [request.model_name for request in core.asked]


@pytest.mark.parametrize(("value", "model", "result"), [(3, "double", 6), (30, "copy", 30)])
def test_one_of_two_branches_makes_the_output(value: int, model: str, result: int) -> None:
    core = SmallCore(EITHER_OR, DOUBLE, COPY)
    answers = core.send(IN=[[value]])
    assert not answers.responses
    core.run_all()
    assert asked(core) == [model]
    assert answers.values("OUT") == [[result]]


def test_what_depends_on_a_step_that_did_not_run_does_not_run_either() -> None:
    config = ensemble(
        "IN", "MAYBE,SURE",
        step("double", {"A": "IN"}, {"B": "mid"}, when="parameters.full == True"),
        step("double", {"A": "mid"}, {"B": "MAYBE"}), step("double", {"A": "IN"}, {"B": "SURE"}),
    )  # fmt: skip
    core = SmallCore(config, DOUBLE)
    answers = core.send(IN=[[1]])
    core.run_all()
    assert asked(core) == ["double"]
    assert [output.name for output in answers.responses[0].outputs] == ["SURE"]


def test_a_step_that_can_do_without_the_skipped_tensor_runs() -> None:
    config = ensemble(
        "X,Y", "Z", step("double", {"A": "Y"}, {"B": "mid"}, when="False"),
        step("pick", {"I": "X", "J": "mid"}, {"P": "Z"}),
    )  # fmt: skip
    pick = config_of(member("pick", "I,J", "P"))
    pick.input[1].optional = True
    core = SmallCore(config, DOUBLE)
    core.configs["pick"] = pick
    answers = core.send(X=[[1]], Y=[[2]])
    core.run_all()
    assert list(core.asked[0].inputs) == ["I"]
    assert answers.values("Z") == [[1]]


def test_a_condition_can_read_what_another_step_made() -> None:
    config = ensemble(
        "IN", "OUT,SCORE", step("double", {"A": "IN"}, {"B": "SCORE"}),
        step("copy", {"I": "IN"}, {"P": "OUT"}, when="SCORE > 5"),
    )  # fmt: skip
    for value, models in ((1, ["double"]), (4, ["double", "copy"])):
        core = SmallCore(config, DOUBLE, COPY)
        core.send(IN=[[value]])
        core.run_all()
        assert asked(core) == models


def test_a_step_that_only_a_condition_needs_runs() -> None:
    config = ensemble(
        "IN", "OUT", step("double", {"A": "IN"}, {"B": "score"}),
        step("copy", {"I": "IN"}, {"P": "OUT"}, when="score > 5"),
    )  # fmt: skip
    core = SmallCore(config, DOUBLE, COPY)
    core.send(IN=[[4]])
    core.run_all()
    assert asked(core) == ["double", "copy"]


def test_when_nothing_runs_the_answer_is_empty_and_comes_after_submit() -> None:
    core = SmallCore(ensemble("IN", "OUT", step("double", {"A": "IN"}, {"B": "OUT"}, when="False")), DOUBLE)
    answers = core.send(IN=[[1]])
    assert not answers.responses
    core.run_all()
    assert answers.is_final
    assert not answers.error
    assert not answers.responses[0].outputs


def test_each_answer_of_a_stream_is_judged_by_itself() -> None:
    config = ensemble(
        "IN", "OUT", step("repeat", {"A": "IN"}, {"B": "mid"}),
        step("double", {"A": "mid"}, {"B": "OUT"}, when="mid < 3"),
        step("copy", {"I": "mid"}, {"P": "OUT"}, when="mid >= 3"),
    )  # fmt: skip
    core = SmallCore(config, member("repeat", "A", "B"), DOUBLE, COPY)
    answers = core.send(IN=[[1]])
    repeat = core.waiting[0]
    for value in (1, 5, 2):
        core.reply(repeat, final=False, B=np.array([[value]]))
    core.respond(repeat, InferResponse(has_response=False))
    core.run_all()
    assert sorted(answers.values("OUT")) == [[2], [4], [5]]


def test_two_steps_that_both_make_a_tensor_are_an_error() -> None:
    config = ensemble(
        "IN", "OUT", step("double", {"A": "IN"}, {"B": "OUT"}, when="IN > 0"),
        step("copy", {"I": "IN"}, {"P": "OUT"}, when="IN > 1"),
    )  # fmt: skip
    core = SmallCore(config, DOUBLE, COPY)
    answers = core.send(IN=[[5]])
    core.clock.run_soon()
    copy, double = core.waiting[1], core.waiting[0]
    core.respond(copy, InferResponse([tensor("P", np.array([[1]]))]))
    core.answer(double)
    assert "more than one step made the ensemble tensor 'OUT'" in answers.error


def test_a_condition_that_does_not_fit_its_tensor_fails_the_request() -> None:
    core = SmallCore(ensemble("IN", "OUT", step("double", {"A": "IN"}, {"B": "OUT"}, when="IN > 1")), DOUBLE)
    answers = core.send(IN=[[1], [2]])
    core.run_all()
    assert answers.error == "in ensemble 'ens', condition 'IN > 1': it compares 2 values: use any() or all()"
    assert core.scheduler.num_in_flight == 0


def lookup(name: str, version: str) -> ModelConfig:
    return {config.name: config for config in map(config_of, (DOUBLE, ADD_SUB, COPY))}[name]


def test_conditions_are_checked_at_load() -> None:
    assert check_ensemble(EITHER_OR, lookup) is False
    with pytest.raises(InvalidArgument, match="in ensemble ens, step 0 of model 'double': condition 'IN >'"):
        EnsembleGraph.of(ensemble("IN", "OUT", step("double", {"A": "IN"}, {"B": "OUT"}, when="IN >")))
    with pytest.raises(InvalidArgument, match="the condition of step 0 of model 'double' reads tensor 'never', which"):
        check_ensemble(ensemble("IN", "OUT", step("double", {"A": "IN"}, {"B": "OUT"}, when="never > 1")), lookup)


def test_step_times_come_with_the_answer_if_asked_for() -> None:
    core = SmallCore(CHAIN, DOUBLE)
    answers = core.send(IN=[[1]])
    core.run_all()
    assert "step_times" not in answers.responses[0].parameters
    asking = core.send(parameters={"step_times": True}, IN=[[1]])
    core.run_all()
    times = json.loads(str(asking.responses[0].parameters["step_times"]))
    assert [(one["step"], one["model"]) for one in times] == [(0, "double"), (1, "double")]
    assert {"queue_us", "compute_us", "total_us"} <= times[0].keys()
