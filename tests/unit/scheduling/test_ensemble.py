"""Ensembles over a small core of functions, on a manual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import Cancelled, EnginehouseError, InvalidArgument, NotFound, Unavailable
from enginehouse.scheduling.build import build_scheduler
from enginehouse.scheduling.ensemble_handover import HandsOver
from enginehouse.testing.clock import ManualClock
from enginehouse.types import Array, InferRequest, InferResponse, ParameterValue, Tensor

from .factories import Answers, Observer, config_of

Member = Callable[[InferRequest, "SmallCore"], None]


def member(name: str, inputs: str, outputs: str, max_batch_size: int = 4, extra: str = "", dims: int = 1) -> str:
    """A model's config; names are comma separated."""
    sides = [("input", name) for name in inputs.split(",")] + [("output", name) for name in outputs.split(",")]
    tensors = " ".join(f'{side} {{ name: "{name}" data_type: TYPE_INT32 dims: [{dims}] }}' for side, name in sides)
    return f'name: "{name}" max_batch_size: {max_batch_size} {tensors} {extra}'


def step(model: str, inputs: dict[str, str], outputs: dict[str, str], when: str = "") -> str:
    maps = [f'input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items()]
    maps += [f'output_map {{ key: "{key}" value: "{value}" }}' for key, value in outputs.items()]
    condition = f'serving {{ when: "{when}" }}' if when else ""
    return f'step {{ model_name: "{model}" model_version: -1 {" ".join(maps)} {condition} }}'


def ensemble(inputs: str, outputs: str, *steps: str, max_batch_size: int = 4, extra: str = "") -> ModelConfig:
    scheduling = f"ensemble_scheduling {{ {' '.join(steps)} {extra} }}"
    return config_of(member("ens", inputs, outputs, max_batch_size, scheduling))


DOUBLE = member("double", "A", "B")
ADD_SUB = member("add_sub", "INPUT0,INPUT1", "OUTPUT0,OUTPUT1")
CHAIN = ensemble("IN", "OUT", step("double", {"A": "IN"}, {"B": "mid"}), step("double", {"A": "mid"}, {"B": "OUT"}))
FAN = ensemble(
    "L,R",
    "TOTAL,DELTA,TWICE",
    step("double", {"A": "L"}, {"B": "l2"}),
    step("add_sub", {"INPUT0": "l2", "INPUT1": "R"}, {"OUTPUT0": "TOTAL", "OUTPUT1": "d"}),
    step("double", {"A": "d"}, {"B": "DELTA"}),
    step("double", {"A": "l2"}, {"B": "TWICE"}),
)


def tensor(name: str, array: Array) -> Tensor:
    return Tensor.from_numpy(name, array.astype(np.int32))


class SmallCore:
    """Runs members one request at a time, in the order that a test lets them."""

    def __init__(self, config: ModelConfig, *members: str, hands_over: HandsOver | None = None) -> None:
        self.clock = ManualClock()
        self.observer = Observer()
        self.configs = {parsed.name: parsed for parsed in map(config_of, members)}
        self.asked: list[InferRequest] = []
        self.waiting: list[InferRequest] = []
        self.cancelled: list[InferRequest] = []
        self.scheduler = build_scheduler(
            config,
            1,
            [],
            self.observer,
            self.submit,
            lookup=self.lookup,
            clock=self.clock,
            hands_over=hands_over,
        )

    def lookup(self, name: str, version: str) -> ModelConfig:
        if name not in self.configs:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        return self.configs[name]

    def submit(self, request: InferRequest) -> None:
        config = self.lookup(request.model_name, request.model_version)
        request.batch_size = next(iter(request.inputs.values())).shape[0] if config.max_batch_size else 0
        request.on_cancel = self.cancelled.append
        self.asked.append(request)
        self.waiting.append(request)

    def send(
        self,
        outputs: tuple[str, ...] = (),
        parameters: dict[str, ParameterValue] | None = None,
        **inputs: list[list[int]],
    ) -> Answers:
        arrays = {name: tensor(name, np.array(rows)) for name, rows in inputs.items()}
        request = InferRequest("ens", id="r1", inputs=arrays, requested_outputs=outputs)
        request.parameters = parameters or {}
        request.batch_size = next(iter(arrays.values())).shape[0]
        answers = Answers(request)
        request.sink = answers
        self.scheduler.submit(request)
        return answers

    def run_all(self) -> None:
        self.clock.run_soon()
        while self.waiting:
            self.answer(self.waiting[0])
            self.clock.run_soon()

    def answer(self, request: InferRequest) -> None:
        """Computes what the model would and sends it as the only answer."""
        inputs = {name: value.numpy() for name, value in request.inputs.items()}
        if request.model_name == "double":
            results = {"B": 2 * inputs["A"]}
        elif request.model_name == "add_sub":
            left, right = inputs["INPUT0"], inputs["INPUT1"]
            results = {"OUTPUT0": left + right, "OUTPUT1": left - right}
        else:
            results = dict(zip(("P", "Q"), inputs.values(), strict=False))
        wanted = [tensor(name, array) for name, array in results.items() if name in request.requested_outputs]
        self.respond(request, InferResponse(wanted))

    def reply(self, request: InferRequest, final: bool = True, **outputs: Array) -> None:
        tensors = [tensor(name, array) for name, array in outputs.items()]
        self.respond(request, InferResponse(tensors, final=final))

    def respond(self, request: InferRequest, response: InferResponse) -> None:
        if response.final:
            self.waiting.remove(request)
        assert request.sink is not None
        request.sink(response)


def test_a_chain_passes_tensors_on() -> None:
    core = SmallCore(CHAIN, DOUBLE)
    answers = core.send(IN=[[1], [2]])
    core.run_all()
    assert answers.values("OUT") == [[4, 8]]
    assert answers.is_final
    assert core.scheduler.num_in_flight == 0


def test_answers_carry_the_sequence_parameters_and_the_ensembles_name() -> None:
    core = SmallCore(CHAIN, DOUBLE)
    answers = core.send(IN=[[1]])
    core.run_all()
    response = answers.responses[0]
    assert response.parameters == {"sequence_id": 0, "sequence_start": False, "sequence_end": False}
    assert (response.model_name, response.model_version, response.id) == ("ens", "1", "r1")


def test_tensors_between_steps_are_not_copied() -> None:
    core = SmallCore(CHAIN, DOUBLE)
    core.send(IN=[[1]])
    given = core.send(IN=[[1]]).request.inputs["IN"]
    assert core.asked[1].inputs["A"].data is given.data
    made = tensor("B", np.array([[2]]))
    core.respond(core.waiting[0], InferResponse([made]))
    assert core.asked[2].inputs["A"].data is made.data


def test_branches_run_side_by_side_and_join() -> None:
    core = SmallCore(FAN, DOUBLE, ADD_SUB)
    answers = core.send(L=[[1]], R=[[10]])
    assert [request.model_name for request in core.waiting] == ["double"]
    core.answer(core.waiting[0])
    assert [request.model_name for request in core.waiting] == ["add_sub", "double"]
    core.run_all()
    assert [output.name for output in answers.responses[0].outputs] == ["TOTAL", "DELTA", "TWICE"]
    assert (answers.values("TOTAL"), answers.values("DELTA"), answers.values("TWICE")) == (
        [[12]],
        [[-16]],
        [[4]],
    )


def test_only_steps_that_a_requested_output_needs_are_run() -> None:
    core = SmallCore(FAN, DOUBLE, ADD_SUB)
    answers = core.send(("TWICE",), L=[[1]], R=[[10]])
    core.run_all()
    assert [request.model_name for request in core.asked] == ["double", "double"]
    assert [output.name for output in answers.responses[0].outputs] == ["TWICE"]


def test_a_missing_optional_input_is_left_out_of_the_step() -> None:
    config = ensemble("X,Y", "Z", step("pick", {"I": "X", "J": "Y"}, {"P": "Z"}))
    config.input[1].optional = True
    core = SmallCore(config, member("pick", "I,J", "P"))
    answers = core.send(X=[[3]])
    assert list(core.asked[0].inputs) == ["I"]
    core.run_all()
    assert answers.values("Z") == [[3]]


def test_an_error_in_a_step_names_the_ensemble_and_cancels_the_other_steps() -> None:
    core = SmallCore(FAN, DOUBLE, ADD_SUB)
    answers = core.send(L=[[1]], R=[[10]])
    core.answer(core.waiting[0])
    failing, other = core.waiting
    core.respond(failing, InferResponse(error=InvalidArgument("no good")))
    assert answers.error == "in ensemble 'ens', no good"
    assert isinstance(answers.responses[-1].error, InvalidArgument)
    assert core.cancelled == [other]
    core.run_all()
    assert len(answers.responses) == 1


def test_a_step_that_is_refused_fails_the_request_after_submit_returned() -> None:
    core = SmallCore(CHAIN)
    core.configs["double"] = config_of(DOUBLE)

    def refuse(request: InferRequest) -> None:
        raise Unavailable("Exceeds maximum queue size")

    core.scheduler.submit_step = refuse  # type: ignore[attr-defined]  # stands for a full queue
    answers = core.send(IN=[[1]])
    assert not answers.responses
    core.clock.run_soon()
    assert answers.error == "in ensemble 'ens', Exceeds maximum queue size"


def test_cancelling_answers_at_once_and_tells_the_steps() -> None:
    core = SmallCore(CHAIN, DOUBLE)
    answers = core.send(IN=[[1]])
    answers.request.cancel()
    assert isinstance(answers.responses[-1].error, Cancelled)
    assert core.cancelled == core.asked
    core.run_all()
    assert len(answers.responses) == 1
    assert len(core.asked) == 1


def test_each_answer_of_a_decoupled_step_runs_the_steps_behind_it() -> None:
    config = ensemble(
        "IN", "OUT,AGAIN", step("repeat", {"A": "IN"}, {"B": "mid"}),
        step("double", {"A": "mid"}, {"B": "OUT"}), step("double", {"A": "mid"}, {"B": "AGAIN"}),
    )  # fmt: skip
    config.model_transaction_policy.decoupled = True
    core = SmallCore(config, member("repeat", "A", "B"), DOUBLE)
    answers = core.send(IN=[[3]])
    repeat = core.waiting[0]
    for value in (1, 2, 3):
        core.reply(repeat, final=False, B=np.array([[value]]))
    core.respond(repeat, InferResponse(has_response=False))
    core.run_all()
    assert answers.values("OUT") == [[2], [4], [6]]
    assert answers.values("AGAIN") == [[2], [4], [6]]
    assert [response.final for response in answers.responses] == [False, False, True]


def test_a_tensor_that_comes_after_a_whole_stream_completes_all_of_its_answers() -> None:
    config = ensemble(
        "IN", "OUT,TWO", step("repeat", {"A": "IN"}, {"B": "OUT"}), step("double", {"A": "IN"}, {"B": "TWO"})
    )
    config.model_transaction_policy.decoupled = True
    core = SmallCore(config, member("repeat", "A", "B"), DOUBLE)
    answers = core.send(IN=[[10]])
    repeat, double = core.waiting
    for value in (1, 2, 3):
        core.reply(repeat, final=False, B=np.array([[value]]))
    core.respond(repeat, InferResponse(has_response=False))
    core.answer(double)
    assert answers.values("OUT") == [[1], [2], [3]]
    assert answers.values("TWO") == [[20], [20], [20]]
    assert [response.final for response in answers.responses] == [False, False, True]


def test_a_decoupled_step_without_answers_ends_with_a_bare_final() -> None:
    config = ensemble("IN", "OUT", step("repeat", {"A": "IN"}, {"B": "OUT"}))
    config.model_transaction_policy.decoupled = True
    core = SmallCore(config, member("repeat", "A", "B"))
    answers = core.send(IN=[[3]])
    core.respond(core.waiting[0], InferResponse(has_response=False))
    assert [(response.final, response.has_response) for response in answers.responses] == [(True, False)]


def test_tensors_from_outside_a_branch_are_seen_by_every_answer() -> None:
    config = ensemble(
        "IN", "OUT", step("repeat", {"A": "IN"}, {"B": "mid"}), step("double", {"A": "IN"}, {"B": "two"}),
        step("add_sub", {"INPUT0": "mid", "INPUT1": "two"}, {"OUTPUT0": "OUT"}),
    )  # fmt: skip
    core = SmallCore(config, member("repeat", "A", "B"), DOUBLE, ADD_SUB)
    answers = core.send(IN=[[10]])
    repeat, double = core.waiting
    core.reply(repeat, final=False, B=np.array([[1]]))
    core.answer(double)
    core.reply(repeat, B=np.array([[2]]))
    core.run_all()
    assert answers.values("OUT") == [[21], [22]]


def test_long_streams_leave_nothing_behind() -> None:
    config = ensemble(
        "IN", "OUT", step("repeat", {"A": "IN"}, {"B": "mid"}), step("double", {"A": "mid"}, {"B": "OUT"})
    )
    core = SmallCore(config, member("repeat", "A", "B"), DOUBLE)
    core.send(IN=[[1]])
    (run,) = core.scheduler._runs  # type: ignore[attr-defined]  # what must not grow
    repeat = core.waiting[0]
    for value in range(50):
        core.reply(repeat, final=False, B=np.array([[value]]))
        core.answer(core.waiting[1])
    assert len(run._tensors) == 1


def test_no_more_requests_of_a_step_than_allowed_are_in_flight() -> None:
    config = ensemble("IN", "OUT", step("double", {"A": "IN"}, {"B": "OUT"}), extra="max_inflight_requests: 2")
    core = SmallCore(config, DOUBLE)
    answers = [core.send(IN=[[value]]) for value in range(5)]
    assert len(core.waiting) == 2
    answers[2].request.cancel()
    answers[3].request.cancel()
    core.answer(core.waiting[0])
    assert [request.inputs["A"].numpy().item() for request in core.waiting] == [1, 4]
    core.run_all()
    assert [answer.values("OUT") for answer in answers] == [[[0]], [[2]], [], [], [[8]]]


def test_a_batch_axis_is_dropped_and_added_between_batching_and_other_models() -> None:
    config = ensemble(
        "IN", "OUT", step("single", {"A": "IN"}, {"P": "mid"}), step("double", {"A": "mid"}, {"B": "OUT"})
    )
    core = SmallCore(config, member("single", "A", "P", max_batch_size=0), DOUBLE)
    answers = core.send(IN=[[7]])
    assert core.asked[0].inputs["A"].shape == (1,)
    core.run_all()
    assert core.asked[1].inputs["A"].shape == (1, 1)
    assert answers.responses[0].outputs[0].shape == (1, 1)


def test_a_graph_that_can_not_go_on_is_an_error() -> None:
    config = ensemble("IN", "OUT", step("double", {"A": "never"}, {"B": "OUT"}))
    core = SmallCore(config, DOUBLE)
    answers = core.send(IN=[[1]])
    core.run_all()
    assert answers.error.startswith("in ensemble 'ens', [request id: r1] unexpected deadlock")


@pytest.mark.asyncio
async def test_drain_waits_for_the_last_run() -> None:
    core = SmallCore(CHAIN, DOUBLE)
    core.send(IN=[[1]])
    draining = asyncio.ensure_future(core.scheduler.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    core.run_all()
    await draining


def test_close_fails_what_runs() -> None:
    core = SmallCore(CHAIN, DOUBLE)
    answers = core.send(IN=[[1]])
    core.scheduler.close()
    assert isinstance(answers.responses[0].error, Unavailable)
    with pytest.raises(EnginehouseError, match="stopped accepting"):
        core.send(IN=[[1]])


@pytest.mark.parametrize("hands_over", [None, lambda giver, taker: False], ids=["through the server", "where it is"])
def test_a_step_whose_model_has_gone_meanwhile_ends_the_request_with_its_error(hands_over: HandsOver | None) -> None:
    core = SmallCore(CHAIN, DOUBLE, hands_over=hands_over)
    answers = core.send(IN=[[1]])
    del core.configs["double"]
    core.run_all()
    [response] = answers.responses
    assert isinstance(response.error, NotFound)
    assert core.scheduler.num_in_flight == 0
