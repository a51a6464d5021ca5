"""generate and generate_stream: flat JSON to tensors and parameters, answers to flat JSON or events."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from enginehouse.errors import EnginehouseError, Internal
from enginehouse.frontends.http_message import HttpResponse, HttpStream
from enginehouse.types import InferRequest, InferResponse, Tensor

from .little_server import LittleServer, collected, joined, little_server

TEXT_MODEL = """
input { name: "text_input" data_type: TYPE_STRING dims: [1] }
input { name: "matrix" data_type: TYPE_FP32 dims: [2, -1] optional: true }
output { name: "text_output" data_type: TYPE_STRING dims: [1] }
"""


def report(request: InferRequest) -> list[InferResponse]:
    seen = {name: [list(t.shape), t.numpy().reshape(-1).tolist()] for name, t in request.inputs.items()}
    text = json.dumps([seen, request.parameters], default=bytes.decode)
    return [InferResponse([Tensor.from_numpy("text_output", np.array([text.encode()], object))])]


def words(request: InferRequest) -> list[InferResponse | EnginehouseError]:
    text = request.inputs["text_input"].numpy()[0].decode()
    answers: list[InferResponse | EnginehouseError] = []
    for word in text.split():
        if word == "fail":
            answers.append(Internal("asked to fail"))
        else:
            answers.append(InferResponse([Tensor.from_numpy("text_output", np.array([word.encode()], object))]))
    return [*answers, InferResponse(has_response=False)]


@pytest.fixture
def server() -> LittleServer:
    decoupled = TEXT_MODEL + " model_transaction_policy { decoupled: true }"
    return little_server({"report": (TEXT_MODEL, report), "words": (decoupled, words)})


async def generate(server: LittleServer, model: str, document: Any) -> tuple[int, Any]:
    reply = await server.http("POST", f"/v2/models/{model}/generate", json.dumps(document).encode())
    assert isinstance(reply, HttpResponse)
    assert reply.content_type == "application/json"
    return reply.status, json.loads(joined(reply))


@pytest.mark.asyncio
async def test_inputs_become_tensors_and_the_rest_parameters(server: LittleServer) -> None:
    status, answer = await generate(
        server, "report", {"text_input": "hi", "n": 3, "parameters": {"t": 0.5, "matrix": [1, 2, 3, 4]}, "id": "g"}
    )
    seen, parameters = json.loads(answer["text_output"])
    assert (status, answer["id"], answer["model_name"]) == (200, "g", "report")
    assert seen == {"text_input": [[1], ["hi"]], "matrix": [[2, 2], [1.0, 2.0, 3.0, 4.0]]}
    assert parameters == {"n": 3, "t": 0.5, "id": "g"}


@pytest.mark.parametrize(
    ("document", "status", "text"),
    [
        ({"text_input": ["a", "b"]}, 400, "The schema can not convert input 'text_input' to tensor"),
        ({"text_input": "a", "matrix": [1, 2, 3]}, 400, "The schema can not convert input 'matrix'"),
        ({"text_input": 5}, 500, "Unable to parse JSON bytes array: attempt to access JSON non-string"),
        ({"text_input": "a", "deep": {}}, 400, "parameter 'deep' has invalid type."),
        (
            {"text_input": "a", "parameters": {"deep": {}}},
            400,
            "Converting keyword: 'parameters': parameter 'deep' has invalid type.",
        ),
        ({"text_input": "a", "parameters": 1}, 500, "Expected JSON object for keyword: 'parameters'"),
        ({"x": 1}, 400, "expected number of inputs between 1 and 2 but got 0 inputs"),
        ([], 500, "attempt to get members for non-object"),
    ],
)
@pytest.mark.asyncio
async def test_what_does_not_fit_is_said(server: LittleServer, document: Any, status: int, text: str) -> None:
    found, answer = await generate(server, "report", document)
    assert (found, text in answer["error"]) == (status, True), answer


@pytest.mark.parametrize("text", ["one two", "  "])
@pytest.mark.asyncio
async def test_generate_wants_exactly_one_answer(server: LittleServer, text: str) -> None:
    status, answer = await generate(server, "words", {"text_input": text})
    assert status == 200
    assert answer["error"].startswith("generate expects model to produce exactly 1 response")


@pytest.mark.parametrize(
    ("text", "status", "events"),
    [
        ("one two", 200, ["one", "two"]),
        ("one fail", 200, ["one", "asked to fail"]),
        ("fail", 400, ["asked to fail"]),
        (" ", 200, []),
    ],
)
@pytest.mark.asyncio
async def test_a_stream_has_an_event_for_each_answer_and_the_status_of_the_first(
    server: LittleServer, text: str, status: int, events: list[str]
) -> None:
    body = json.dumps({"text_input": text}).encode()
    reply = await server.http("POST", "/v2/models/words/generate_stream", body)
    assert isinstance(reply, HttpStream)
    assert (reply.status, reply.content_type) == (status, "text/event-stream; charset=utf-8")
    chunks = (await collected(reply)).split(b"\n\n")[:-1]
    documents = [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]
    assert [d.get("text_output", d.get("error")) for d in documents] == events


@pytest.mark.asyncio
async def test_decoupled_models_answer_infer_with_events_when_asked_for_them(server: LittleServer) -> None:
    document = {"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["a b"]}]}
    body = json.dumps(document).encode()
    reply = await server.http("POST", "/v2/models/words/infer", body)
    assert (reply.status, reply.content_type) == (501, "text/plain")
    reply = await server.http("POST", "/v2/models/words/infer", body, {"Accept": "text/event-stream"})
    chunks = (await collected(reply)).split(b"\n\n")[:-1]
    documents = [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]
    assert [d["outputs"][0]["data"] for d in documents] == [["a"], ["b"]]


@pytest.mark.asyncio
async def test_leaving_a_stream_early_cancels_the_request(server: LittleServer) -> None:
    body = json.dumps({"text_input": "one two three"}).encode()
    reply = await server.http("POST", "/v2/models/words/generate_stream", body)
    assert isinstance(reply, HttpStream)
    await anext(reply.chunks)
    await reply.chunks.aclose()  # type: ignore[attr-defined]  # an async generator
    [request] = server.schedulers["words"].cancelled
    assert request.cancelled
