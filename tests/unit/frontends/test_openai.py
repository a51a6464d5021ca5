"""The OpenAI API over an engine of letters: whole and streamed answers, and what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from enginehouse.frontends.http_message import HttpPush, HttpRequest, HttpResponse, Reply
from enginehouse.frontends.http_routes import Router
from enginehouse.frontends.openai.front_end import OpenAIFrontEnd
from enginehouse.frontends.restricted_apis import RestrictedApis
from enginehouse.options import ServerOptions
from enginehouse.types import InferRequest, InferResponse, Tensor

from .little_engine import LetterEngine, letter_server
from .little_server import Headers, joined, little_server


class Listener:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.sent = b""
        self.closed = asyncio.Event()
        self.num_waiting_bytes = 0

    def send(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def engine() -> LetterEngine:
    return LetterEngine()


@pytest.fixture
def router(engine: LetterEngine) -> Router:
    return letter_server(engine)


async def ask(router: Router, path: str, document: Any = None, method: str = "POST", **headers: str) -> Reply:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await router.handle(HttpRequest(method, path, "", Headers(named), body if document is not None else b""))


async def answer(router: Router, path: str, document: Any) -> tuple[int, Any]:
    reply = await ask(router, path, document)
    assert isinstance(reply, HttpResponse)
    return reply.status, json.loads(joined(reply))


@pytest.mark.asyncio
@pytest.mark.parametrize(("headers", "tenant"), [({}, "ann"), ({"x_tenant": "acme"}, "acme")])
async def test_the_header_names_the_tenant_before_the_user_does(
    router: Router, engine: LetterEngine, headers: dict[str, str], tenant: str
) -> None:
    document = {"model": "letters", "prompt": "hi", "user": "ann"}
    assert isinstance(await ask(router, "/v1/completions", document, **headers), HttpResponse)
    assert [request.tenant for request in engine.requests] == [tenant]


async def complete(router: Router, **fields: Any) -> Any:
    status, document = await answer(router, "/v1/completions", {"model": "letters", "prompt": "hi", **fields})
    assert status == 200, document
    return document


async def stream(router: Router, path: str, document: Any) -> list[Any]:
    reply = await ask(router, path, {**document, "stream": True})
    assert isinstance(reply, HttpPush)
    listener = Listener()
    reply.begin(listener)
    await asyncio.wait_for(listener.closed.wait(), 5)
    events = listener.sent.split(b"\n\n")
    assert events.pop() == b""
    assert events.pop() == b"data: [DONE]"
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


@pytest.mark.asyncio
async def test_a_completion_has_text_reason_and_usage(router: Router) -> None:
    document = await complete(router, max_tokens=3)
    [choice] = document["choices"]
    assert (document["object"], document["model"], document["id"][:5]) == ("text_completion", "letters", "cmpl-")
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("abc", "length", None)
    assert document["usage"] == {
        "prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip


@pytest.mark.asyncio
async def test_without_a_limit_a_completion_has_sixteen_tokens(router: Router) -> None:
    assert (await complete(router))["usage"]["completion_tokens"] == 16


@pytest.mark.asyncio
async def test_a_stop_string_ends_it_and_is_named(router: Router) -> None:
    [choice] = (await complete(router, stop=["c"]))["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "c")


@pytest.mark.asyncio
async def test_prompts_times_n_make_the_choices_and_seeds_differ_within_a_prompt(
    router: Router, engine: LetterEngine
) -> None:
    document = await complete(router, prompt=["a", "bcd"], n=2, seed=7, max_tokens=1)
    assert [choice["index"] for choice in document["choices"]] == [0, 1, 2, 3]
    assert [request.sampling.seed for request in engine.requests] == [7, 8, 7, 8]
    assert [request.prompt for request in engine.requests] == ["a", "a", "bcd", "bcd"]
    assert (document["usage"]["prompt_tokens"], document["usage"]["completion_tokens"]) == (4, 4)


@pytest.mark.parametrize("prompt", [[72, 105], [[72, 105]]])
@pytest.mark.asyncio
async def test_prompts_may_be_token_ids(router: Router, engine: LetterEngine, prompt: Any) -> None:
    document = await complete(router, prompt=prompt, max_tokens=2, return_token_ids=True)
    assert engine.requests[0].prompt == [72, 105]
    assert document["choices"][0]["token_ids"] == [97, 98]
    assert document["choices"][0]["prompt_token_ids"] == [72, 105]


@pytest.mark.asyncio
async def test_completion_logprobs_stand_side_by_side(router: Router) -> None:
    [choice] = (await complete(router, logprobs=2, max_tokens=2))["choices"]
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 1]
    assert list(choice["logprobs"]["top_logprobs"][0]) == ["a", "b"]
    assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(-0.693147, abs=1e-6)


@pytest.mark.asyncio
async def test_echo_puts_the_prompt_and_its_logprobs_first(router: Router) -> None:
    [choice] = (await complete(router, echo=True, logprobs=1, max_tokens=1))["choices"]
    assert choice["text"] == "hia"
    assert choice["logprobs"]["tokens"] == ["h", "i", "a"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


@pytest.mark.asyncio
async def test_a_chat_answer_is_a_message(router: Router, engine: LetterEngine) -> None:
    messages = [{"role": "user", "content": "yo"}]
    status, document = await answer(
        router,
        "/v1/chat/completions",
        {"model": "letters", "messages": messages, "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 1},
    )
    [choice] = document["choices"]
    assert (status, document["object"]) == (200, "chat.completion")
    assert choice["message"] == {"role": "assistant", "content": "ab"}
    assert choice["logprobs"]["content"][1]["token"] == "b"
    assert choice["logprobs"]["content"][1]["bytes"] == [98]
    assert document["usage"]["prompt_tokens"] == len("user:yo|assistant:")
    assert not engine.requests[0].add_special_tokens


@pytest.mark.asyncio
async def test_a_stream_adds_up_to_the_whole_answer(router: Router) -> None:
    whole = (await complete(router, n=2, seed=3, max_tokens=5, stop="f"))["choices"]
    fields = {"model": "letters", "prompt": "hi", "n": 2, "seed": 3, "max_tokens": 5, "stop": "f"}
    chunks = await stream(router, "/v1/completions", {**fields, "stream_options": {"include_usage": True}})
    usage = chunks.pop()
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 2 + 3 + 2)
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == whole[index]["text"]
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == whole[index]["finish_reason"]
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.asyncio
async def test_a_stream_that_is_over_before_it_begins_has_all_its_choices(router: Router) -> None:
    document = {"model": "letters", "prompt": ["a", "b"], "n": 2, "max_tokens": 1}
    chunks = await stream(router, "/v1/completions", document)
    finished = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert finished == [0, 1, 2, 3]


@pytest.mark.asyncio
async def test_a_stream_that_failed_before_it_begins_says_nothing_more(router: Router) -> None:
    document = {"model": "letters", "prompt": ["a", "b" * 101, "c"], "max_tokens": 1, "stream": True}
    reply = await ask(router, "/v1/completions", document)
    assert isinstance(reply, HttpPush)
    listener = Listener()
    reply.begin(listener)
    assert listener.sent.endswith(b"data: [DONE]\n\n")
    assert listener.sent.count(b"[DONE]") == 1
    assert b"too long" in listener.sent


@pytest.mark.asyncio
async def test_a_chat_stream_says_first_who_speaks(router: Router) -> None:
    fields = {"messages": [{"role": "user", "content": "yo"}], "max_tokens": 2, "return_token_ids": True}
    chunks = await stream(router, "/v1/chat/completions", fields)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert "".join(map(chr, chunks[0]["prompt_token_ids"])) == "user:yo|assistant:"
    assert [chunk["choices"][0].get("token_ids") for chunk in chunks] == [None, [97], [98]]


@pytest.mark.asyncio
async def test_streamed_logprobs_know_where_they_are_in_the_text(router: Router) -> None:
    chunks = await stream(router, "/v1/completions", {"prompt": "hi", "max_tokens": 3, "logprobs": 0})
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [1], [2]]
    assert chunks[0]["choices"][0]["logprobs"]["top_logprobs"] == [{}]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.asyncio
async def test_what_the_engine_finds_later_is_still_a_status(router: Router, streamed: bool) -> None:
    status, document = await answer(router, "/v1/completions", {"prompt": "x" * 101, "stream": streamed})
    assert (status, document["error"]["message"]) == (400, "prompt of 101 tokens is too long")


@pytest.mark.asyncio
async def test_leaving_cancels_every_sequence(router: Router, engine: LetterEngine) -> None:
    reply = await ask(router, "/v1/completions", {"prompt": "hi", "n": 3, "stream": True, "max_tokens": 50})
    assert isinstance(reply, HttpPush)
    reply.begin(Listener())
    reply.on_gone()
    assert len(engine.cancelled) == 3


@pytest.mark.asyncio
async def test_a_cancelled_handler_cancels_its_sequences(router: Router, engine: LetterEngine) -> None:
    engine.gate = asyncio.Event()
    tasks = [
        asyncio.create_task(ask(router, "/v1/completions", {"prompt": "hi", "stream": streamed}))
        for streamed in (True, False)
    ]
    for _ in range(5):
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(engine.cancelled) == 2


@pytest.mark.asyncio
async def test_a_client_that_does_not_read_loses_its_answer(router: Router, engine: LetterEngine) -> None:
    reply = await ask(router, "/v1/completions", {"prompt": "hi", "stream": True, "max_tokens": 90})
    assert isinstance(reply, HttpPush)
    listener = Listener()
    listener.num_waiting_bytes = 2**30
    reply.begin(listener)
    assert listener.closed.is_set()
    assert b"reads too slowly" in listener.sent
    assert len(engine.cancelled) == 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": None}, "prompt: is missing"),
        ({"prompt": []}, "prompt: is empty"),
        ({"prompt": [1, "a"]}, "prompt: is neither a text nor"),
        ({"max_tokens": 0}, "max_tokens: 0 is not at least 1"),
        ({"max_tokens": "many"}, "request body: Expected `int | null`, got `str` - at `$.max_tokens`"),
        ({"temperature": -1}, "temperature: -1.0 is not at least 0.0"),
        ({"top_p": 0}, "top_p: 0.0 is not above 0 and at most 1.0"),
        ({"top_k": -2}, "top_k: -2"),
        ({"n": 0}, "n: 0 is not between 1 and 128"),
        ({"n": 3, "best_of": 5}, "best_of: "),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens: 9 is more than max_tokens, 3"),
        ({"prompt": ["hi"] * 9, "n": 128}, "n: 128 choices for each of 9 prompts are more than 1024"),
        ({"stop": [""]}, "stop: an empty string"),
        ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is no token id"),
        ({"logprobs": 21}, "logprobs: 21 is not between 0 and 20"),
        ({"stop_token_ids": [-1]}, "Expected `int` >= 0 - at `$.stop_token_ids[0]`"),
        ({"stream_options": {"include_usage": True}}, "stream_options: needs stream: true"),
        ({"response_format": {"type": "json_object"}}, "response_format: type 'json_object' is not supported"),
        ({"bad_words": ["x"]}, "refused at once"),
    ],
)
@pytest.mark.asyncio
async def test_bad_fields_are_named(router: Router, fields: dict[str, Any], text: str) -> None:
    status, document = await answer(router, "/v1/completions", {"prompt": "hi", **fields})
    assert (status, text in document["error"]["message"]) == (400, True), document


@pytest.mark.asyncio
async def test_bad_json_and_unknown_models_have_their_status(router: Router) -> None:
    assert (await ask(router, "/v1/completions", b"{")).status == 400
    status, document = await answer(router, "/v1/completions", {"model": "nobody", "prompt": "hi"})
    assert (status, document["error"]["code"], document["error"]["type"]) == (404, 404, "not_found_error")


@pytest.mark.asyncio
async def test_models_are_listed_and_shown(router: Router) -> None:
    listed = json.loads(joined(await ask(router, "/v1/models", method="GET")))
    assert [model["id"] for model in listed["data"]] == ["letters"]
    shown = json.loads(joined(await ask(router, "/v1/models/letters", method="GET")))
    assert (shown["object"], shown["owned_by"]) == ("model", "Triton Inference Server")
    assert (await ask(router, "/v1/models/nobody", method="GET")).status == 404


@pytest.mark.asyncio
async def test_without_a_language_model_there_is_no_such_api() -> None:
    router = letter_server(LetterEngine(), names=())
    reply = await ask(router, "/v1/models", method="GET")
    assert (reply.status, reply.content_type) == (404, "text/plain")
    assert (await ask(router, "/v1/completions", {"prompt": "x"})).status == 404


@pytest.mark.asyncio
async def test_text_goes_to_tokens_and_back(router: Router) -> None:
    _, document = await answer(router, "/tokenize", {"prompt": "hi"})
    assert (document["count"], document["tokens"]) == (2, [104, 105])
    _, document = await answer(router, "/tokenize", {"messages": [{"role": "user", "content": "x"}]})
    assert document["prompt"] == "user:x|assistant:"
    _, document = await answer(router, "/detokenize", {"tokens": [104, 105]})
    assert document["prompt"] == "hi"


@pytest.mark.asyncio
async def test_restricted_groups_need_their_header(engine: LetterEngine) -> None:
    router = letter_server(engine, openai_restricted_api=("inference key secret",))
    assert (await ask(router, "/v1/completions", {"prompt": "hi"})).status == 401
    assert (await ask(router, "/v1/completions", {"prompt": "hi"}, key="secret")).status == 200
    assert (await ask(router, "/v1/models", method="GET")).status == 200


BROKEN = "InvalidArgument: model.safetensors is cut short"


@pytest.mark.asyncio
@pytest.mark.parametrize("names", [(), ("letters",)])
async def test_a_model_that_failed_to_load_is_refused_with_the_reason(
    engine: LetterEngine, names: tuple[str, ...]
) -> None:
    router = letter_server(engine, names, failed={"broken": BROKEN})
    for path in ("/v1/completions", "/v1/chat/completions"):
        document = {"model": "broken", "prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}
        status, refusal = await answer(router, path, document)
        assert (status, refusal["error"]["message"]) == (404, f"The model 'broken' is not available: {BROKEN}")
    reply = await ask(router, "/v1/models/broken", method="GET")
    assert isinstance(reply, HttpResponse)
    assert (reply.status, BROKEN.encode() in joined(reply)) == (404, True)
    listing = await ask(router, "/v1/models", method="GET")
    assert isinstance(listing, HttpResponse)
    assert [model["id"] for model in json.loads(joined(listing))["data"]] == list(names)


@pytest.mark.asyncio
@pytest.mark.parametrize(("trusted", "status"), [(False, 400), (True, 200)])
async def test_a_request_brings_a_chat_template_only_where_it_is_trusted(
    engine: LetterEngine, trusted: bool, status: int
) -> None:
    """A template is a program: one of `{{ 'x' * 10**10 }}` takes all memory."""
    router = letter_server(engine, trust_request_chat_template=trusted)
    document = {"model": "letters", "messages": [{"role": "user", "content": "hi"}], "chat_template": "{{ 1 }}"}
    found, refusal = await answer(router, "/v1/chat/completions", document)
    assert found == status
    assert trusted or "--trust-request-chat-template" in refusal["error"]["message"]


@pytest.mark.asyncio
async def test_embeddings_of_other_models_have_a_tenant_too() -> None:
    tenants: list[str] = []

    def embed(request: InferRequest) -> list[InferResponse]:
        tenants.append(request.tenant)
        vectors = np.ones((request.inputs["text"].shape[0], 2), np.float32)
        return [InferResponse([Tensor.from_numpy("embedding", vectors)])]

    config = (
        'max_batch_size: 4 input { name: "text" data_type: TYPE_STRING dims: [1] } '
        'output { name: "embedding" data_type: TYPE_FP32 dims: [2] }'
    )
    server = little_server({"e": (config, embed)})
    router = Router(OpenAIFrontEnd(server.core, ServerOptions()).routes(), RestrictedApis(()))
    document = {"model": "e", "input": ["a", "b"], "user": "ann"}
    assert (await answer(router, "/v1/embeddings", document))[0] == 200
    await ask(router, "/v1/embeddings", {**document, "input": "a"}, x_tenant="acme")
    assert tenants == ["ann", "acme"]
