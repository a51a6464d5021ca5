"""A v2 request to a language model: what goes into the engine and what comes back as tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from enginehouse.errors import Cancelled, InvalidArgument
from enginehouse.execution.generations import Generations
from enginehouse.scheduling.generative import GenerativeScheduler
from enginehouse.types import (
    FinishReason,
    GenerateRequest,
    InferRequest,
    InferResponse,
    MetricFamily,
    Tensor,
    TokenEvent,
    TokenLogprob,
)

from .factories import Observer


@dataclass
class Engine:
    """An engine that generates what the test tells it to."""

    asked: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    emits: dict[str, Callable[[TokenEvent], None]] = field(default_factory=dict)
    generations: Generations = field(default_factory=Generations)

    def submit(self, request: GenerateRequest, emit: Callable[[TokenEvent], None]) -> None:
        self.asked.append(request)
        self.emits[request.id] = emit

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    async def metrics(self) -> Sequence[MetricFamily]:
        return ()

    def say(self, index: int, *parts: str) -> None:
        request_id = self.asked[index].id
        for number, part in enumerate(parts, 1):
            last = FinishReason.STOP if number == len(parts) else None
            logprobs = [] if self.asked[index].sampling.logprobs is None else [[TokenLogprob(number, part, -0.5, 1)]]
            event = TokenEvent(
                request_id, part, [number], logprobs, last, num_prompt_tokens=3, num_generated_tokens=number
            )
            self.emits[request_id](event)


def asking(engine: Engine, parameters: dict[str, object] | None = None, **inputs: object) -> list[InferResponse]:
    answers: list[InferResponse] = []
    tensors = {}
    for name, value in {"text_input": "Once", **inputs}.items():
        array = np.array([value]) if isinstance(value, bool) else np.array([str(value).encode()], dtype=object)
        tensors[name] = Tensor.from_numpy(name, array)
    request = InferRequest("m", inputs=tensors, parameters=dict(parameters or {}), sink=answers.append)  # type: ignore[arg-type]
    GenerativeScheduler("m", "1", engine, Observer()).submit(request)
    return answers


def texts(response: InferResponse) -> list[str]:
    return [element.decode() for element in response.outputs[0].numpy().tolist()]


def test_without_streaming_there_is_one_answer_with_prompt_and_text() -> None:
    engine = Engine()
    answers = asking(engine)
    engine.say(0, " upon", " a time")
    assert [texts(answer) for answer in answers] == [["Once upon a time"]]
    assert answers[0].final


def test_streaming_gives_each_part_without_the_prompt() -> None:
    engine = Engine()
    answers = asking(engine, stream=True)
    engine.say(0, " upon", " a time")
    assert [(texts(answer), answer.final) for answer in answers] == [([" upon"], False), ([" a time"], True)]


def test_sampling_parameters_come_from_the_input_and_from_request_parameters() -> None:
    engine = Engine()
    asking(engine, {"temperature": 0, "stop": "\n"}, sampling_parameters=json.dumps({"max_tokens": 5, "seed": 7}))
    sampling = engine.asked[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed, sampling.stop) == (0.0, 5, 7, ["\n"])


def test_several_texts_arrive_together_with_seeds_of_their_own() -> None:
    engine = Engine()
    answers = asking(engine, {"n": 2, "seed": 1}, exclude_input_in_output=True)
    engine.say(1, "second")
    assert answers == []
    engine.say(0, "first")
    assert texts(answers[0]) == ["first", "second"]
    assert [request.sampling.seed for request in engine.asked] == [1, 2]


FURTHER: dict[str, Any] = {
    "return_finish_reason": True, "return_cumulative_logprob": True, "return_logprobs": True,
    "return_num_input_tokens": True, "return_num_output_tokens": True, "return_token_ids": True,
}  # fmt: skip


def further(response: InferResponse) -> dict[str, list[object]]:
    return {tensor.name: tensor.numpy().tolist() for tensor in response.outputs[1:]}


def test_further_outputs_are_given_when_asked_for() -> None:
    engine = Engine()
    answers = asking(engine, {"logprobs": 1}, **FURTHER)
    engine.say(0, "a", "b")
    assert further(answers[0]) == {
        "finish_reason": [b"stop"], "cumulative_logprob": [-1.0], "num_input_tokens": [3], "num_output_tokens": [2],
        "logprobs": [
            b'[{"1":{"logprob":-0.5,"rank":1,"decoded_token":"a"}},{"2":{"logprob":-0.5,"rank":1,"decoded_token":"b"}}]'
        ],
        "token_ids": [b"[1,2]"],
    }  # fmt: skip


def test_a_streamed_part_tells_what_is_new_in_it() -> None:
    engine = Engine()
    answers = asking(engine, stream=True, **FURTHER)
    engine.say(0, "a", "b")
    first, last = map(further, answers)
    assert (first["finish_reason"], last["finish_reason"]) == ([b"None"], [b"stop"])
    assert (first["token_ids"], last["token_ids"]) == ([b"[1]"], [b"[2]"])
    assert (first["num_output_tokens"], last["num_output_tokens"]) == ([1], [1])
    assert (first["cumulative_logprob"], last["cumulative_logprob"]) == ([-0.5], [-1.0])
    assert last["logprobs"] == [b"null"], "the sampling parameters ask for none"


@pytest.mark.parametrize(
    ("parameters", "inputs", "text"),
    [
        ({}, {"sampling_parameters": "{"}, "'sampling_parameters' is not JSON"),
        ({}, {"sampling_parameters": "[]"}, "must be a JSON object, found list"),
        ({"temperature": "hot"}, {}, "temperature"),
        ({"n": 0}, {}, "'n' must be a whole number between 1 and 128, found 0"),
        ({"n": 10**9}, {}, "'n' must be a whole number between 1 and 128"),
        ({}, {"sampling_parameters": '{"temprature": 1}'}, "'sampling_parameters' has no 'temprature'; there are: "),
        ({}, {"sampling_parameters": '{"lora_name": "x"}'}, "LoRA feature is not enabled"),
        ({"use_beam_search": True}, {}, "beam search is not supported"),
        ({"truncate_prompt_tokens": "x"}, {}, "sampling parameters"),
        ({}, {"stream": True, "exclude_input_in_output": False}, "When streaming, `exclude_input_in_output` = False"),
        ({"n": 2}, {"stream": True}, "'n' must be 1 with 'stream'"),
    ],
)
def test_wrong_parameters_are_named(parameters: dict[str, object], inputs: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        asking(Engine(), parameters, **inputs)


def test_cancelling_frees_the_sequence_and_answers_once() -> None:
    engine = Engine()
    answers: list[InferResponse] = []
    request = InferRequest(
        "m", inputs={"text_input": Tensor.from_numpy("text_input", np.array([b"x"], object))}, sink=answers.append
    )
    GenerativeScheduler("m", "1", engine, Observer()).submit(request)
    request.cancel()
    engine.say(0, "too late")
    assert engine.cancelled == [engine.asked[0].id]
    assert len(answers) == 1
    assert isinstance(answers[0].error, Cancelled)
