"""Sequence batching, both strategies, on a manual clock."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import Cancelled, Internal, InvalidArgument, Unavailable
from enginehouse.execution.contract import Batch
from enginehouse.types import InferRequest, InferResponse, Tensor

from .factories import Answers, Rig, config_of, request_of, rig_of

CONTROLS = """
    control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }
    control_input { name: "END" control { kind: CONTROL_SEQUENCE_END fp32_false_true: [0, 1] } }
    control_input { name: "READY" control { kind: CONTROL_SEQUENCE_READY bool_false_true: [false, true] } }
    control_input { name: "CORRID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }
"""


def sequence_config(strategy: str, max_batch_size: int = 2, extra: str = CONTROLS, dims: str = "1") -> ModelConfig:
    return config_of(
        f"""name: "m" max_batch_size: {max_batch_size}
        input {{ name: "X" data_type: TYPE_INT32 dims: [{dims}] }}
        output {{ name: "X" data_type: TYPE_INT32 dims: [{dims}] }}
        sequence_batching {{ {strategy} max_sequence_idle_microseconds: 5000000 {extra} }}"""
    )


DIRECT = sequence_config("direct {}")
OLDEST = sequence_config("oldest { max_candidate_sequences: 4 }")
BOTH = pytest.mark.parametrize("config", [DIRECT, OLDEST], ids=["direct", "oldest"])


def values(batch: Batch, name: str) -> list[object]:
    """The tensor's value in each request of the batch."""
    return [request.inputs[name].numpy().item() for request in batch.requests]


def whole(rig: Rig, value: int, correlation_id: int) -> Answers:
    """A sequence of one request."""
    return rig.send(value, correlation_id=correlation_id, start=True, end=True)


# --- validation


@BOTH
def test_a_sequence_must_start_with_the_start_flag(config: ModelConfig) -> None:
    rig = rig_of(config)
    with pytest.raises(InvalidArgument) as refused:
        rig.send(1, correlation_id=1003)
    assert str(refused.value) == (
        "inference request for sequence 1003 to model 'm' must specify the START flag on the first request of "
        "the sequence"
    )


@BOTH
@pytest.mark.parametrize("correlation_id", [0, ""])
def test_a_sequence_needs_an_id(config: ModelConfig, correlation_id: int | str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        rig_of(config).send(1, correlation_id=correlation_id, start=True)
    assert str(refused.value) == ("inference request to model 'm' must specify a non-zero or non-empty correlation ID")


@BOTH
def test_requests_of_more_than_one_row_are_refused(config: ModelConfig) -> None:
    with pytest.raises(InvalidArgument) as refused:
        rig_of(config).send(1, 2, correlation_id=1, start=True)
    assert str(refused.value) == (
        "inference request to model 'm' must specify batch-size 1 due to requirements of sequence batcher"
    )


def test_after_its_end_a_sequence_is_unknown() -> None:
    rig = rig_of(DIRECT)
    whole(rig, 1, correlation_id=7)
    with pytest.raises(InvalidArgument, match="must specify the START flag"):
        rig.send(2, correlation_id=7)


def test_a_text_id_for_a_number_control_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="use a number"):
        rig_of(DIRECT).send(1, correlation_id="a", start=True)


# --- controls


@BOTH
def test_controls_tell_where_in_the_sequence_a_request_is(config: ModelConfig) -> None:
    rig = rig_of(config)
    seen = []
    for start, end in ((True, False), (False, False), (False, True)):
        rig.send(1, correlation_id=2**64 - 1, start=start, end=end)
        rig.clock.run_soon()
        batch = rig.instance.step()
        seen.append([values(batch, name) for name in ("START", "END", "READY", "CORRID")])
    number = 2**64 - 1
    assert seen == [[[1], [0.0], [True], [number]], [[0], [0.0], [True], [number]], [[0], [1.0], [True], [number]]]
    assert batch.requests[0].inputs["START"].shape == (1, 1)


@pytest.mark.parametrize(
    ("datatype", "correlation_id", "seen"),
    [
        ("TYPE_STRING", "s-a", b"s-a"),
        ("TYPE_STRING", 77, b"77"),
        ("TYPE_INT32", 2**32 + 5, 5),
        ("TYPE_INT64", 2**64 - 1, -1),
        ("TYPE_UINT32", 12, 12),
    ],
)
def test_the_correlation_id_comes_in_the_type_that_the_model_wants(
    datatype: str, correlation_id: int | str, seen: object
) -> None:
    control = f'control_input {{ name: "C" control {{ kind: CONTROL_SEQUENCE_CORRID data_type: {datatype} }} }}'
    rig = rig_of(sequence_config("direct {}", max_batch_size=0, extra=control))
    rig.submit(request_of(np.zeros(1, np.int32), correlation_id=correlation_id, start=True, batching=False))
    rig.clock.run_soon()
    tensor = rig.instance.step().requests[0].inputs["C"]
    assert tensor.shape == (1,)
    assert tensor.numpy()[0] == seen


# --- direct


def test_direct_keeps_every_sequence_in_its_row_and_fills_gaps_with_null_requests() -> None:
    rig = rig_of(sequence_config("direct {}", max_batch_size=3))
    for correlation_id in (1, 2, 3):
        rig.send(10 * correlation_id, correlation_id=correlation_id, start=True)
    rig.run_all()
    rig.send(31, correlation_id=3)
    rig.clock.run_soon()
    batch = rig.instance.step()
    assert values(batch, "READY") == [False, False, True]
    assert values(batch, "X") == [0, 0, 31]
    assert values(batch, "CORRID") == [0, 0, 3]
    rig.send(11, correlation_id=1)
    rig.clock.run_soon()
    assert values(rig.instance.step(), "X") == [11]
    assert [len(batch) for batch in rig.observer.batches] == [3, 1, 1]
    assert rig.observer.null_rows == [0, 2, 0]


def test_direct_gives_another_shape_its_own_batch() -> None:
    rig = rig_of(sequence_config("direct {}", max_batch_size=2, dims="-1"))
    rig.submit(request_of(np.ones((1, 3), np.int32), correlation_id=1, start=True))
    rig.submit(request_of(np.ones((1, 5), np.int32), correlation_id=2, start=True))
    rig.clock.run_soon()
    assert [request.inputs["X"].shape for request in rig.instance.step().requests] == [(1, 3)]
    batch = rig.instance.step()
    assert [request.inputs["X"].shape for request in batch.requests] == [(1, 5), (1, 5)]
    assert values_of_ready(batch) == [False, True]


def values_of_ready(batch: Batch) -> list[bool]:
    return [bool(request.inputs["READY"].numpy().item()) for request in batch.requests]


def test_direct_waits_for_enough_slots_or_for_the_delay() -> None:
    strategy = "direct { max_queue_delay_microseconds: 1000 minimum_slot_utilization: 0.75 }"
    rig = rig_of(sequence_config(strategy, max_batch_size=4))
    rig.send(1, correlation_id=1, start=True)
    rig.send(2, correlation_id=2, start=True)
    rig.clock.advance(us=999)
    assert rig.waiting_sizes == []
    rig.clock.advance(us=1)
    assert rig.waiting_sizes == [2]
    rig.instance.step()
    for correlation_id in (1, 2):
        rig.send(3, correlation_id=correlation_id)
    rig.send(4, correlation_id=3, start=True)
    rig.clock.run_soon()
    assert rig.waiting_sizes == [3]


# --- oldest


def test_oldest_batches_sequences_and_keeps_each_ones_order() -> None:
    rig = rig_of(OLDEST)
    for value in (1, 2):
        for correlation_id in (1, 2, 3):
            rig.send(10 * correlation_id + value, correlation_id=correlation_id, start=value == 1)
    rig.run_all()
    batches = [[r.inputs["X"].numpy().item() for r in batch] for batch in rig.observer.batches]
    assert batches == [[11, 21], [31, 12], [22, 32]]


def test_oldest_holds_an_incomplete_batch_for_its_delay() -> None:
    strategy = "oldest { max_candidate_sequences: 4 preferred_batch_size: [2] max_queue_delay_microseconds: 500 }"
    rig = rig_of(sequence_config(strategy, max_batch_size=4))
    rig.send(1, correlation_id=1, start=True)
    rig.clock.advance(us=499)
    assert rig.waiting_sizes == []
    rig.send(2, correlation_id=2, start=True)
    rig.clock.run_soon()
    assert rig.waiting_sizes == [2]


def test_oldest_can_preserve_the_order_of_answers() -> None:
    strategy = "oldest { max_candidate_sequences: 1 preserve_ordering: true }"
    rig = rig_of(sequence_config(strategy, max_batch_size=1), num_instances=2)
    first, second = whole(rig, 1, 1), whole(rig, 2, 2)
    rig.clock.run_soon()
    rig.instances[1].step()
    assert not second.responses
    rig.instances[0].step()
    assert first.is_final
    assert second.is_final


# --- slots and backlog


@BOTH
def test_requests_of_a_sequence_run_one_after_the_other_on_one_instance(config: ModelConfig) -> None:
    rig = rig_of(config, num_instances=2)
    for value, (start, end) in enumerate(((True, False), (False, False), (False, True))):
        rig.send(value, correlation_id=5, start=start, end=end)
    rig.run_all()
    assert sorted(map(len, (instance.sizes for instance in rig.instances))) == [0, 3]


def test_sequences_spread_over_the_instances() -> None:
    rig = rig_of(sequence_config("direct {}", max_batch_size=2), num_instances=2)
    for correlation_id in (1, 2):
        rig.send(1, correlation_id=correlation_id, start=True)
    rig.clock.run_soon()
    assert [instance.sizes for instance in rig.instances] == [[1], [1]]


def test_a_sequence_waits_in_the_backlog_until_a_slot_is_free() -> None:
    rig = rig_of(sequence_config("direct {}", max_batch_size=1))
    rig.send(1, correlation_id=11, start=True)
    rig.run_all()
    waiting = whole(rig, 10, 12)
    rig.clock.advance(s=1)
    assert not waiting.responses
    rig.send(2, correlation_id=11, end=True)
    rig.run_all()
    assert waiting.values() == [[10]]


def test_a_sequence_that_waits_too_long_for_a_slot_is_refused_as_a_whole() -> None:
    rig = rig_of(sequence_config("direct {}", max_batch_size=1))
    rig.send(1, correlation_id=1, start=True)
    waiting = [rig.send(2, correlation_id=2, start=True), rig.send(3, correlation_id=2, timeout_us=4000)]
    rig.clock.advance(ms=4)
    assert [answer.error for answer in waiting] == ["timeout of the corresponding sequence has been expired"] * 2
    with pytest.raises(InvalidArgument):
        rig.send(4, correlation_id=2)


def test_start_again_without_end_continues_in_the_same_slot() -> None:
    rig = rig_of(sequence_config("direct {}", max_batch_size=1))
    for start in (True, False, True):
        rig.send(1, correlation_id=5, start=start)
    rig.run_all()
    assert rig.instance.sizes == [1, 1, 1]


@BOTH
def test_an_idle_sequence_is_forgotten_and_its_slot_given_on(config: ModelConfig) -> None:
    rig = rig_of(config)
    for correlation_id in range(1, 6):
        rig.send(1, correlation_id=correlation_id, start=True)
    rig.run_all()
    rig.clock.advance(s=2)
    rig.send(1, correlation_id=1)
    rig.run_all()
    rig.clock.advance(s=3)
    rig.run_all()
    rig.send(1, correlation_id=1)
    with pytest.raises(InvalidArgument, match="must specify the START flag"):
        rig.send(1, correlation_id=2)
    for _ in range(5):
        rig.clock.advance(s=5)
        rig.run_all()
    assert rig.scheduler.num_in_flight == 0
    assert rig.clock.num_timers == 0


def test_a_sequence_is_not_idle_while_its_request_runs() -> None:
    rig = rig_of(DIRECT)
    rig.send(1, correlation_id=1, start=True)
    rig.clock.advance(s=20)
    rig.instance.step()
    rig.send(2, correlation_id=1)
    rig.run_all()
    assert rig.instance.sizes == [1, 1]


# --- cancellation and failure


@BOTH
def test_cancelling_a_waiting_request_ends_its_sequence_there(config: ModelConfig) -> None:
    rig = rig_of(config)
    answers = [rig.send(value, correlation_id=1, start=value == 0) for value in range(4)]
    rig.clock.run_soon()
    answers[2].request.cancel()
    assert [type(answer.responses[0].error) for answer in answers if answer.responses] == [Cancelled, Cancelled]
    with pytest.raises(InvalidArgument):
        rig.send(4, correlation_id=1)
    rig.run_all()
    assert [answer.values() for answer in answers] == [[[0]], [[1]], [], []]
    assert rig.scheduler.num_in_flight == 0
    assert rig.scheduler.num_pending == 0


@BOTH
def test_cancelling_in_the_backlog_cancels_the_whole_sequence(config: ModelConfig) -> None:
    rig = rig_of(config)
    for correlation_id in range(1, 5):
        rig.send(1, correlation_id=correlation_id, start=True)
    late = [rig.send(value, correlation_id=9, start=value == 0) for value in range(3)]
    late[1].request.cancel()
    states = {type(answer.responses[0].error) for answer in late if answer.responses}
    assert states == {Cancelled}


def test_cancelling_a_running_request_tells_its_instance() -> None:
    rig = rig_of(DIRECT)
    answers = rig.send(1, correlation_id=1, start=True, end=True)
    rig.clock.run_soon()
    answers.request.cancel()
    assert rig.instance.cancelled == [answers.request]
    rig.run_all()
    assert answers.is_final


def test_a_deadline_ends_the_sequence_of_a_waiting_request() -> None:
    rig = rig_of(DIRECT)
    first = rig.send(1, correlation_id=1, start=True)
    second = rig.send(2, correlation_id=1, deadline_ns=rig.clock.now_ns() + 2_000_000)
    rig.clock.advance(ms=3)
    assert second.error == "Request timeout expired"
    rig.run_all()
    assert first.is_final


@BOTH
def test_sequences_of_an_instance_that_stops_are_lost(config: ModelConfig) -> None:
    rig = rig_of(config)
    running, waiting = rig.send(1, correlation_id=1, start=True), rig.send(2, correlation_id=1)
    rig.clock.run_soon()
    rig.instance.available = False
    rig.scheduler.set_instances(rig.instances)
    assert isinstance(waiting.responses[0].error, Unavailable)
    rig.instance.fail("host died")
    assert running.error == "host died"
    with pytest.raises(InvalidArgument):
        rig.send(3, correlation_id=1)
    later = whole(rig, 4, 2)
    rig.clock.run_soon()
    assert not later.responses
    rig.instance.available = True
    rig.scheduler.set_instances(rig.instances)
    rig.run_all()
    assert later.values() == [[4]]


@BOTH
def test_close_refuses_everything_that_waits(config: ModelConfig) -> None:
    rig = rig_of(config)
    answers = [rig.send(value, correlation_id=1, start=value == 0) for value in range(3)]
    rig.scheduler.close()
    assert all(answer.error for answer in answers)
    assert rig.scheduler.num_in_flight == 0
    assert rig.clock.num_timers == 0


@pytest.mark.asyncio
async def test_drain_gives_the_slots_of_quiet_sequences_to_those_that_wait() -> None:
    rig = rig_of(sequence_config("direct {}", max_batch_size=1))
    rig.send(1, correlation_id=1, start=True)
    rig.run_all()
    waiting = rig.send(2, correlation_id=2, start=True)
    draining = asyncio.ensure_future(rig.scheduler.drain())
    await asyncio.sleep(0)
    rig.run_all()
    await draining
    assert waiting.values() == [[2]]


# --- implicit state


STATE = """
    control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }
    state { input_name: "SUM_IN" output_name: "SUM_OUT" data_type: TYPE_INT32 dims: [ 1 ] %s }
"""


def running_sum(inputs: dict[str, object]) -> dict[str, object]:
    total = inputs["SUM_IN"] + inputs["X"]  # type: ignore[operator]  # arrays
    return {"X": total, "SUM_OUT": total}


@pytest.mark.parametrize("strategy", ["direct {}", "oldest { max_candidate_sequences: 4 }"])
def test_state_goes_from_request_to_request_and_not_to_the_client(strategy: str) -> None:
    rig = rig_of(sequence_config(strategy, extra=STATE % ""), function=running_sum)  # type: ignore[arg-type]
    answers = {
        correlation_id: [rig.send(value, correlation_id=correlation_id, start=value == 1) for value in (1, 2, 3)]
        for correlation_id in (1, 2)
    }
    rig.run_all()
    for sent in answers.values():
        assert [answer.values() for answer in sent] == [[[1]], [[3]], [[6]]]
        assert [output.name for output in sent[0].responses[0].outputs] == ["X"]
    again = rig.send(5, correlation_id=1, start=True)
    rig.run_all()
    assert again.values() == [[5]]


def test_a_null_request_does_not_touch_the_state_of_its_row() -> None:
    rig = rig_of(sequence_config("direct {}", extra=STATE % ""), function=running_sum)  # type: ignore[arg-type]
    for correlation_id in (1, 2):
        rig.send(10, correlation_id=correlation_id, start=True)
    rig.run_all()
    rig.send(1, correlation_id=2)
    rig.run_all()
    last = rig.send(1, correlation_id=1)
    rig.run_all()
    assert last.values() == [[11]]


def test_initial_state_is_zero_or_the_bytes_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "initial_state").mkdir()
    (tmp_path / "initial_state" / "seven").write_bytes(np.int32(7).tobytes())
    initial = 'initial_state { name: "i" data_type: TYPE_INT32 dims: [ 1 ] data_file: "seven" }'
    config = sequence_config("direct {}", extra=STATE % initial)
    rig = rig_of(config, function=running_sum, model_directory=tmp_path)  # type: ignore[arg-type]
    answers = rig.send(1, correlation_id=1, start=True)
    rig.run_all()
    assert answers.values() == [[8]]


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        ('name: "i" data_type: TYPE_FP32 dims: [ 1 ] zero_data: true', "does not match the state data type"),
        ("data_type: TYPE_INT32 dims: [ 1 ] zero_data: true", "Field 'name' must be set"),
        ('name: "i" data_type: TYPE_INT32 dims: [ 1, 1 ] zero_data: true', "2 != 1"),
        ('name: "i" data_type: TYPE_INT32 dims: [ -1 ] zero_data: true', "contains variable dimensions"),
        ('name: "i" data_type: TYPE_INT32 dims: [ 2 ] zero_data: true', "doesn't match 'state' dim description"),
        ('name: "i" data_type: TYPE_INT32 dims: [ 1 ]', "to have state_data set"),
        ('name: "i" data_type: TYPE_INT32 dims: [ 1 ] data_file: "none"', "failed to open text file for read .*none: "),
    ],
)
def test_an_initial_state_that_does_not_fit_is_refused(initial: str, message: str, tmp_path: Path) -> None:
    config = sequence_config("direct {}", extra=STATE % f"initial_state {{ {initial} }}")
    with pytest.raises((InvalidArgument, Internal), match=message):
        rig_of(config, model_directory=tmp_path)


def test_a_state_without_a_type_is_refused() -> None:
    config = sequence_config("direct {}", extra='state { input_name: "IN" output_name: "OUT" dims: [ 1 ] }')
    with pytest.raises(InvalidArgument, match="state 'IN' has no data_type"):
        rig_of(config)


def test_states_that_grow_to_different_shapes_do_not_share_a_batch() -> None:
    def append(inputs: dict[str, object]) -> dict[str, object]:
        history = np.concatenate([inputs["SUM_IN"], inputs["X"]], axis=1)
        return {"X": history, "SUM_OUT": history}

    grows = STATE.replace("dims: [ 1 ]", "dims: [ -1 ] use_growable_memory: true") % ""
    rig = rig_of(sequence_config("oldest {}", extra=grows), function=append)  # type: ignore[arg-type]
    long = [rig.send(value, correlation_id=1, start=value == 1) for value in (1, 2)]
    rig.run_all()
    long.append(rig.send(3, correlation_id=1))
    short = rig.send(9, correlation_id=2, start=True)
    rig.run_all()
    assert long[-1].values() == [[0, 1, 2, 3]]
    assert short.values() == [[0, 9]]
    assert rig.instance.sizes == [1, 1, 1, 1]


# --- iterative sequences


ITERATIVE = "iterative_sequence: true"


@pytest.mark.parametrize("strategy", ["direct {}", "oldest { max_candidate_sequences: 2 }"])
def test_an_iterative_request_runs_as_often_as_the_model_wants(strategy: str) -> None:
    rig = rig_of(sequence_config(strategy, extra=ITERATIVE + CONTROLS))
    answers = rig.send(7)
    starts = []
    for _ in range(3):
        rig.clock.run_soon()
        starts.append(reschedule(rig))
    rig.run_all()
    assert starts == [1, 0, 0]
    assert len(rig.observer.batches) == 4
    assert answers.values() == [[7]]
    assert rig.scheduler.num_in_flight == 0


def reschedule(rig: Rig) -> object:
    """The model sends an answer that is not final and asks for the request again."""
    batch = rig.instance.waiting.pop(0)
    (request,) = batch.requests
    start = request.inputs["START"].numpy().item()
    assert batch.on_reschedule is not None
    batch.on_response(request, InferResponse(final=False))
    batch.on_reschedule(request)
    rig.instance.finish(batch)
    return start


def test_iterative_requests_join_and_leave_running_batches() -> None:
    rig = rig_of(sequence_config("oldest { max_candidate_sequences: 2 }", extra=ITERATIVE + CONTROLS))
    rig.send(1)
    rig.clock.run_soon()
    rig.send(2)
    reschedule(rig)
    rig.clock.run_soon()
    assert rig.waiting_sizes == [2]


def test_a_cancelled_iterative_request_is_not_run_again() -> None:
    rig = rig_of(sequence_config("direct {}", extra=ITERATIVE + CONTROLS))
    answers = rig.send(1)
    rig.clock.run_soon()
    answers.request.cancel()
    reschedule(rig)
    rig.clock.run_soon()
    assert isinstance(answers.responses[-1].error, Cancelled)
    assert rig.waiting_sizes == []


# --- test hooks


def test_the_first_batch_can_be_held_until_enough_sequences_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSERVER_DELAY_SCHEDULER", "2")
    monkeypatch.setenv("TRITONSERVER_BACKLOG_DELAY_SCHEDULER", "1")
    rig = rig_of(sequence_config("direct {}", max_batch_size=2))
    for correlation_id in (1, 2):
        rig.send(1, correlation_id=correlation_id, start=True)
    rig.clock.run_soon()
    assert rig.waiting_sizes == []
    rig.send(1, correlation_id=3, start=True)
    rig.clock.run_soon()
    assert rig.waiting_sizes == [2]


def test_oldest_counts_what_its_batcher_has_been_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSERVER_DELAY_SCHEDULER", "2")
    rig = rig_of(OLDEST)
    rig.send(1, correlation_id=1, start=True)
    rig.send(2, correlation_id=1)
    rig.clock.run_soon()
    assert rig.waiting_sizes == []
    rig.send(1, correlation_id=2, start=True)
    rig.clock.run_soon()
    assert rig.waiting_sizes == [2]


def test_tensors_of_a_request_stay_what_the_client_sent() -> None:
    rig = rig_of(DIRECT)
    request = InferRequest("m", inputs={"X": Tensor.from_numpy("X", np.array([[3]], np.int32))}, batch_size=1)
    request.correlation_id, request.sequence_start = 4, True
    given = request.inputs["X"]
    rig.submit(request)
    rig.clock.run_soon()
    assert rig.instance.waiting[0].requests[0].inputs["X"] is given
