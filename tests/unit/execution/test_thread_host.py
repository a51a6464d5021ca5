"""Instances in threads: one answer for each request, whatever the backend does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from enginehouse.backend import (
    Backend,
    Instance,
    LoadContext,
    Model,
    Placement,
    RequestInstance,
    TensorInstance,
)
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError, FailureReason, InvalidArgument
from enginehouse.execution.contract import Batch, ExecutionTimes
from enginehouse.execution.mailbox import Mailbox
from enginehouse.execution.thread_host import ThreadHostedModel, load_in_threads
from enginehouse.types import InferRequest, InferResponse, Tensor

PATIENCE_S = 0.05
CONFIG = """
name: "m" max_batch_size: 8
input [{ name: "X" data_type: TYPE_INT32 dims: [2] }]
output [{ name: "Y" data_type: TYPE_INT32 dims: [2] }]"""


class Doubling(TensorInstance):
    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Mapping[str, Tensor]:
        values = inputs["X"].numpy()
        if values[0, 0] < 0:
            raise InvalidArgument("negative")
        return {"Y": Tensor.from_numpy("Y", values * 2)}


class OneByOne(RequestInstance):
    """X[0]: how many answers beside the final flag; negative raises after one answer."""

    def execute(self, requests: Sequence[InferRequest]) -> None:
        for request in requests:
            count = int(request.inputs["X"].numpy()[0, 0])
            assert request.sink is not None
            for index in range(abs(count)):
                output = Tensor.from_numpy("Y", np.full((1, 2), index, np.int32))
                request.sink(InferResponse([output], final=False))
            if count < 0:
                raise ValueError("went wrong")
            request.sink(InferResponse(final=True, has_response=False))


class Waiting(RequestInstance):
    """Answers only when it is cancelled, from another thread."""

    def execute(self, requests: Sequence[InferRequest]) -> None:
        for request in requests:
            request.on_cancel = lambda request: threading.Thread(target=self._answer, args=(request,)).start()

    @staticmethod
    def _answer(request: InferRequest) -> None:
        assert request.sink is not None
        request.sink(InferResponse(final=True, has_response=False))


class Stuck(TensorInstance):
    """Does not come back until it is let go."""

    def __init__(self, let_go: threading.Event) -> None:
        self.let_go = let_go

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Mapping[str, Tensor]:
        self.let_go.wait()
        return {"Y": inputs["X"]}


class FailingToClose(Doubling):
    def close(self) -> None:
        raise RuntimeError("can't close")


class OfClass(Backend, Model):
    """A backend of one instance class."""

    name = "test"

    def __init__(self, make: Callable[[], Instance]) -> None:
        self.make = make
        self.closed = False

    def load(self, context: LoadContext) -> Model:
        return self

    def create_instance(self, placement: Placement) -> Instance:
        return self.make()

    def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def hosted(make: Callable[[], Instance], num_instances: int = 1) -> AsyncIterator[ThreadHostedModel]:
    config = text_format.Parse(CONFIG, ModelConfig())
    context = LoadContext(config, 1, Path("/nowhere"))
    backend = OfClass(make)
    placements = [Placement(f"m_0_{index}") for index in range(num_instances)]
    model = await load_in_threads(backend, context, placements, Mailbox(asyncio.get_running_loop()), PATIENCE_S)
    try:
        yield model
    finally:
        await model.close()
        assert backend.closed
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("instance m")]


def request_of(*values: int) -> InferRequest:
    array = np.array([[value, value] for value in values], np.int32)
    return InferRequest("m", id=f"r{values[0]}", inputs={"X": Tensor.from_numpy("X", array)}, batch_size=len(values))


class Seen:
    """What a scheduler would be told."""

    def __init__(self) -> None:
        self.responses: list[tuple[InferRequest, InferResponse]] = []
        self.answered = asyncio.Event()
        self.done = asyncio.Event()
        self.all_final = asyncio.Event()
        self.times: ExecutionTimes | None = None
        self.error: EnginehouseError | None = None

    async def answers(self, count: int) -> None:
        while len(self.responses) < count:
            self.answered.clear()
            await self.answered.wait()

    def batch(self, *requests: InferRequest) -> Batch:
        owed = [len(requests)]

        def on_response(request: InferRequest, response: InferResponse) -> None:
            self.responses.append((request, response))
            self.answered.set()
            owed[0] -= response.final
            if not owed[0]:
                self.all_final.set()

        def on_done(batch: Batch, times: ExecutionTimes, error: EnginehouseError | None) -> None:
            self.times, self.error = times, error
            self.done.set()

        return Batch(requests, on_response, on_done)


@pytest.mark.asyncio
async def test_a_batch_is_run_once_and_each_request_gets_its_rows() -> None:
    seen = Seen()
    async with hosted(Doubling) as model:
        model.instances[0].execute(seen.batch(request_of(1, 2), request_of(5)))
        await seen.done.wait()
    values = [response.outputs[0].numpy().tolist() for _, response in seen.responses]
    assert values == [[[2, 2], [4, 4]], [[10, 10]]]
    assert [(r.id, r.model_name, r.model_version) for _, r in seen.responses] == [
        ("r1", "m", "1"),
        ("r5", "m", "1"),
    ]
    assert seen.times is not None
    assert seen.times.start_ns <= seen.times.input_end_ns <= seen.times.output_start_ns <= seen.times.end_ns


@pytest.mark.asyncio
async def test_an_exception_fails_every_request_of_the_batch_and_the_instance_goes_on() -> None:
    failing, fine = Seen(), Seen()
    async with hosted(Doubling) as model:
        model.instances[0].execute(failing.batch(request_of(-1), request_of(1)))
        model.instances[0].execute(fine.batch(request_of(3)))
        await fine.done.wait()
    errors = [response.error for _, response in failing.responses]
    assert [str(error) for error in errors] == ["negative", "negative"]
    assert {error.reason for error in errors if error} == {FailureReason.BACKEND}
    assert isinstance(failing.error, InvalidArgument)
    assert fine.responses[0][1].error is None


@pytest.mark.asyncio
async def test_request_instances_answer_any_number_of_times() -> None:
    seen = Seen()
    async with hosted(OneByOne) as model:
        model.instances[0].execute(seen.batch(request_of(2), request_of(0)))
        await seen.all_final.wait()
    assert [(request.id, response.final) for request, response in seen.responses] == [
        ("r2", False), ("r2", False), ("r2", True), ("r0", True)]  # fmt: skip


@pytest.mark.asyncio
async def test_a_model_waits_until_its_answers_are_taken_or_nobody_wants_them() -> None:
    seen = Seen()
    request, cancelled = request_of(4), request_of(5)
    request.max_ahead, cancelled.max_ahead = 2, 1
    async with hosted(OneByOne) as model:
        model.instances[0].execute(seen.batch(request, cancelled))
        await seen.answers(2)
        for number_of_answers in (3, 4):
            request.took_answer()
            await seen.answers(number_of_answers)
            assert request.num_taken == number_of_answers - 2
        assert not seen.all_final.is_set()
        model.instances[0].cancel(cancelled)
        await seen.all_final.wait()
    assert len(seen.responses) == 4 + 1 + 5 + 1


@pytest.mark.asyncio
async def test_raising_after_an_answer_gives_the_final_error_to_those_that_lack_one() -> None:
    seen = Seen()
    async with hosted(OneByOne) as model:
        model.instances[0].execute(seen.batch(request_of(0), request_of(-1), request_of(1)))
        await seen.done.wait()
    finals = {request.id: response.error for request, response in seen.responses if response.final}
    assert finals["r0"] is None
    assert str(finals["r-1"]) == str(finals["r1"]) == "ValueError: went wrong"


@pytest.mark.asyncio
async def test_cancelling_reaches_the_running_model() -> None:
    seen = Seen()
    request = request_of(1)
    async with hosted(Waiting) as model:
        model.instances[0].execute(seen.batch(request))
        await seen.done.wait()
        assert not seen.all_final.is_set()
        model.instances[0].cancel(request)
        await seen.all_final.wait()


@pytest.mark.asyncio
async def test_instances_change_in_place() -> None:
    async with hosted(Doubling, num_instances=2) as model:
        kept = model.instances[1]
        await model.set_instances([Placement("m_0_1"), Placement("m_0_2")])
        assert [instance.name for instance in model.instances] == ["m_0_1", "m_0_2"]
        assert model.instances[0] is kept


@pytest.mark.asyncio
async def test_failing_instance_leaves_nothing_behind() -> None:
    def fail() -> Instance:
        raise RuntimeError("no instance")

    with pytest.raises(EnginehouseError, match="RuntimeError: no instance"):
        async with hosted(fail):
            pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("instance m")]


@pytest.mark.asyncio
async def test_mailbox_loses_nothing_between_threads() -> None:
    mailbox, seen = Mailbox(asyncio.get_running_loop()), list[int]()
    everything = asyncio.Event()

    def take(number: int) -> None:
        seen.append(number)
        if len(seen) == 4000:
            everything.set()

    def post_all() -> None:
        for number in range(1000):
            mailbox.post(take, number)

    threads = [threading.Thread(target=post_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    await everything.wait()
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted(list(range(1000)) * 4)


@pytest.mark.asyncio
async def test_a_stuck_thread_is_left_behind_and_its_memory_stays_booked_until_it_returns() -> None:
    let_go = threading.Event()
    async with hosted(lambda: Stuck(let_go)) as model:
        gone = asyncio.Event()
        model.on_closed = gone.set
        seen = Seen()
        model.instances[0].execute(seen.batch(request_of(1)))
        remains = await model.close()
        [(_, response)] = seen.responses
        assert str(response.error) == "instance 'm_0_0' was to go and answered nothing for 0.05 s"
        assert remains is not None
        assert "instance 'm_0_0' still runs" in remains.text
        assert not gone.is_set()
        let_go.set()
        await remains.gone
        assert gone.is_set()


@pytest.mark.asyncio
async def test_whoever_ends_a_model_says_why_its_requests_fail() -> None:
    let_go = threading.Event()
    async with hosted(lambda: Stuck(let_go), 2) as model:
        seen = Seen()
        model.instances[0].execute(seen.batch(request_of(1)))
        let_go_soon = asyncio.get_running_loop().call_later(0.05, let_go.set)
        assert await model.end("was stopped with the server") is None
        [(_, response)] = seen.responses
        assert str(response.error) == "instance 'm_0_0' was stopped with the server"
        let_go_soon.cancel()


@pytest.mark.asyncio
async def test_a_backend_that_fails_to_close_is_closed_all_the_same() -> None:
    async with hosted(FailingToClose) as model:
        assert await model.close() is None
