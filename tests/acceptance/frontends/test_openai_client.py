"""The openai package against a small language model: what it asks for, it gets."""

from __future__ import annotations

import json
import queue
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.grpc as grpcclient

from enginehouse.testing.server import ServerProcess
from tests.acceptance.frontends.language_model import save_model

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    repository = tmp_path_factory.mktemp("models")
    save_model(repository / "tiny")
    flags = ["--http-max-input-size=65536", "--model-control-mode=explicit", "--load-model=tiny"]
    with ServerProcess([repository], flags) as server:
        yield server


@pytest.fixture(scope="module")
def client(llm: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{llm.http}/v1", api_key="none", max_retries=0)


def running(llm: ServerProcess) -> float:
    with urllib.request.urlopen(llm.metrics_url, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


def test_a_chat_is_its_rendered_prompt(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(messages=HELLO, **GREEDY)
    plain = client.completions.create(prompt="[user] Hello\n[assistant] ", **GREEDY)
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.choices[0].message.role == "assistant"
    assert chat.usage is not None
    assert plain.usage is not None
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens == len("[user] Hello\n[assistant] ")


def test_streamed_deltas_join_to_the_whole_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=1, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=HELLO,
            stream=True,
            logprobs=True,
            top_logprobs=1,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in deltas][-1] == "length"
    assert chunks[-1].usage == whole.usage
    streamed = [row for choice in deltas if choice.logprobs for row in choice.logprobs.content or ()]
    assert whole.choices[0].logprobs is not None
    assert [row.bytes for row in streamed] == [row.bytes for row in whole.choices[0].logprobs.content or ()]


def test_choices_of_several_prompts_keep_their_order(client: openai.OpenAI) -> None:
    together = client.completions.create(prompt=["one", "another", "third"], n=2, **GREEDY)
    alone = [client.completions.create(prompt=prompt, **GREEDY) for prompt in ("one", "another", "third")]
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [a.choices[0].text for a in alone for _ in range(2)]


def test_a_seed_repeats_a_sample_and_choices_differ(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt="Once", max_tokens=16, temperature=1.5, n=3, seed=seed
        )
        return [choice.text for choice in answer.choices]

    first = ask(7)
    assert first == ask(7)
    assert len(set(first)) == 3
    assert first != ask(8)


def test_token_ids_go_in_and_come_out(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True, "ignore_eos": True}
    by_ids: Any = client.completions.create(prompt=list(b"Hello"), extra_body=extra, **GREEDY).choices[0]
    by_text: Any = client.completions.create(prompt="Hello", extra_body=extra, **GREEDY).choices[0]
    assert by_ids.prompt_token_ids == list(b"Hello")
    assert by_ids.token_ids == by_text.token_ids
    assert len(by_ids.token_ids) == 12
    assert bytes(by_ids.token_ids).decode(errors="replace") == by_ids.text


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    tokens: Any = client.completions.create(
        prompt="Hello", extra_body={"return_token_ids": True}, **GREEDY
    ).choices[0]
    stop = next(chr(token) for token in tokens.token_ids if 32 < token < 127)
    answer = client.completions.create(prompt="Hello", stop=[stop], **GREEDY).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.text == tokens.text.partition(stop)[0]


def test_tokens_without_generating(llm: ServerProcess) -> None:
    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"http://{llm.http}{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    tokens = post("/tokenize", {"model": "tiny", "messages": HELLO})["tokens"]
    assert bytes(tokens) == b"[user] Hello\n[assistant] "
    assert post("/detokenize", {"model": "tiny", "tokens": tokens})["prompt"] == "[user] Hello\n[assistant] "


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": "nope"}, openai.NotFoundError, "nope"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "256"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 70_000}]}, openai.APIStatusError, "65536"),
        ({"messages": [{"role": "user", "content": "a" * 300_000}]}, openai.APIStatusError, "65536"),
        ({"logit_bias": {"999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"top_logprobs": 3}, openai.BadRequestError, "logprobs"),
    ],
)
def test_what_cannot_be_done_is_said(
    client: openai.OpenAI, change: dict[str, Any], error: type[openai.APIStatusError], text: str
) -> None:
    with pytest.raises(error, match=text):
        client.chat.completions.create(**{"messages": HELLO, **GREEDY, **change})


def test_a_client_that_leaves_ends_its_generation(llm: ServerProcess, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=250, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline_s = time.monotonic() + 10
    while running(llm) > 0:
        assert time.monotonic() < deadline_s, "the generation goes on"
        time.sleep(0.05)


def test_clients_that_vanish_take_nothing_from_the_others(llm: ServerProcess, client: openai.OpenAI) -> None:
    long: dict[str, Any] = {**GREEDY, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    expected = client.completions.create(prompt="Hello", **long).choices[0].text
    enough = threading.Event()

    def vanish() -> None:
        while not enough.is_set():
            with socket.create_connection(("127.0.0.1", llm.http_port)) as connection:
                body = json.dumps({**GREEDY, "max_tokens": 200, "prompt": "Bye", "stream": True, "ignore_eos": True})
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall((head + body).encode())
                connection.recv(400)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # breaks it off

    with ThreadPoolExecutor(4) as crowd:
        vanishing = [crowd.submit(vanish) for _ in range(4)]
        try:
            for _ in range(20):
                chunks = client.completions.create(prompt="Hello", stream=True, **long)
                assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        finally:
            enough.set()
        assert [one.result() for one in vanishing] == [None] * 4


def test_a_crowd_gets_what_each_alone_would_get(client: openai.OpenAI) -> None:
    prompts = [f"Prompt number {number}" for number in range(24)]

    def ask(prompt: str) -> str:
        return str(client.completions.create(prompt=prompt, **GREEDY).choices[0].text)

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as crowd:
        assert list(crowd.map(ask, prompts)) == alone


def test_the_same_model_answers_generate(llm: ServerProcess, client: openai.OpenAI) -> None:
    body = {"text_input": "Hello", "max_tokens": 12, "temperature": 0, "exclude_input_in_output": True}
    request = urllib.request.Request(f"http://{llm.http}/v2/models/tiny/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        document = json.load(answer)
    assert document["text_output"] == client.completions.create(prompt="Hello", **GREEDY).choices[0].text
    assert (document["model_name"], document["model_version"]) == ("tiny", "1")


@pytest.mark.parametrize("stream", [False, True])
def test_the_v2_protocol_tells_what_tritons_vllm_backend_tells(
    llm: ServerProcess, client: openai.OpenAI, stream: bool
) -> None:
    sampling = json.dumps({"temperature": "0", "max_tokens": 12, "logprobs": 2})
    switches = (
        "return_finish_reason", "return_cumulative_logprob", "return_logprobs", "return_num_input_tokens",
        "return_num_output_tokens", "return_token_ids",
    )  # fmt: skip
    inputs = [text_tensor("text_input", "Hello"), text_tensor("sampling_parameters", sampling)]
    inputs += [flag_tensor(name, True) for name in (*switches, "exclude_input_in_output")]
    inputs.append(flag_tensor("stream", stream))
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with grpcclient.InferenceServerClient(llm.grpc) as triton:
        triton.start_stream(lambda result, error: results.put((result, error)))
        triton.async_stream_infer("tiny", inputs, enable_empty_final_response=True)
        answers: list[Any] = []
        while not answers or not answers[-1].get_response().parameters["triton_final_response"].bool_param:
            result, error = results.get(timeout=30)
            assert error is None
            answers.append(result)
    answers = [answer for answer in answers if answer.get_response().outputs]
    plain = client.completions.create(prompt="Hello", logprobs=2, extra_body={"return_token_ids": True}, **GREEDY)
    told = [{one.name: answer.as_numpy(one.name) for one in answer.get_response().outputs} for answer in answers]
    assert len(told) == (12 if stream else 1)
    assert b"".join(part["text_output"][0] for part in told).decode() == plain.choices[0].text
    token_ids = [token for part in told for token in json.loads(part["token_ids"][0])]
    assert token_ids == plain.choices[0].token_ids
    assert sum(part["num_output_tokens"][0] for part in told) == 12
    assert {int(part["num_input_tokens"][0]) for part in told} == {5}
    assert [part["finish_reason"][0] for part in told] == [b"None"] * (len(told) - 1) + [b"length"]
    rows = [row for part in told for row in json.loads(part["logprobs"][0])]
    assert plain.choices[0].logprobs is not None
    chosen = [row[str(token)]["logprob"] for row, token in zip(rows, token_ids, strict=True)]
    assert chosen == pytest.approx(plain.choices[0].logprobs.token_logprobs, abs=1e-4)
    assert told[-1]["cumulative_logprob"][0] == pytest.approx(sum(chosen), abs=1e-3)


def text_tensor(name: str, text: str) -> grpcclient.InferInput:
    tensor = grpcclient.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=object))
    return tensor


def flag_tensor(name: str, value: bool) -> grpcclient.InferInput:
    tensor = grpcclient.InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([value]))
    return tensor


def test_a_request_that_no_message_can_hold_is_not_waited_for(llm: ServerProcess, client: openai.OpenAI) -> None:
    huge: list[Any] = [{"role": "user", "content": "Hello", "weight": 2**70}]
    with pytest.raises(openai.BadRequestError, match="64"):
        client.chat.completions.create(messages=huge, **GREEDY)
    for action in ("unload", "load"):
        url = f"http://{llm.http}/v2/repository/models/tiny/{action}"
        with urllib.request.urlopen(urllib.request.Request(url, b"", method="POST"), timeout=20) as answer:
            assert answer.status == 200
