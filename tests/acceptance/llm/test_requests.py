"""What requests may ask, what they may not, and that one of them never disturbs another."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from enginehouse.errors import (
    DeadlineExceeded,
    EnginehouseError,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)
from enginehouse.types import ChatPrompt, FinishReason, GenerateTask, SamplingParameters, TokenEvent
from enginehouse_backends.llm.runner import StepInput, StepOutput
from tests.acceptance.llm.serving import GREEDY, Serving
from tests.acceptance.llm.small_models import CONFIGS as CONFIGS
from tests.acceptance.llm.small_models import VOCAB, make_reference, save_reference, save_tokenizer

PROMPT = [1, 2, 3, 4, 5]
LONG = SamplingParameters(temperature=0.0, max_tokens=150, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_reference("llama", folder)
    save_tokenizer(folder)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture
def serving(folder: Path) -> Iterator[Serving]:
    serving = Serving(folder)
    yield serving
    serving.check()
    serving.close()


def refused(serving: Serving, prompt: Any, **fields: Any) -> str:
    """The error's text; raised at once, or the only event."""
    try:
        result = serving.generate(prompt, **fields)
    except InvalidArgument as error:
        return str(error)
    assert len(result.events) == 1
    assert isinstance(result.last.error, EnginehouseError)
    return str(result.last.error)


# --- what can be asked


def test_text_chats_and_ids_are_the_same_prompt(serving: Serving) -> None:
    ids = list(b"hello")
    expected = serving.generate(ids).token_ids
    assert serving.generate("hello").token_ids == expected
    chat = ChatPrompt([{"role": "user", "content": "hel"}, {"role": "user", "content": "lo"}])
    assert serving.generate(chat).token_ids == expected


def test_text_is_that_of_the_tokens(serving: Serving) -> None:
    result = serving.generate("hello", LONG)
    assert len(result.events) == 150
    assert result.text == bytes(result.token_ids).decode("utf-8", "replace")


def test_one_event_where_no_stream_is_wanted(serving: Serving) -> None:
    streamed, whole = serving.generate("hello"), serving.generate("hello", stream=False)
    assert len(whole.events) == 1
    assert (whole.token_ids, whole.text) == (streamed.token_ids, streamed.text)


def test_counts_and_times_are_told(serving: Serving) -> None:
    last = serving.generate("hello", stream=False).last
    assert (last.num_prompt_tokens, last.num_generated_tokens, last.num_cached_tokens) == (5, 24, 0)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.queue_s > 0
    assert last.prefill_s > 0


def test_the_prompt_is_given_back(serving: Serving) -> None:
    first = serving.generate(ChatPrompt([{"role": "user", "content": "hé"}]), return_prompt=True).events[0]
    assert first.prompt_text == "hé"
    assert first.prompt_token_ids == list("hé".encode())


def test_tokenizing_and_back(serving: Serving) -> None:
    event = serving.generate("hé", task=GenerateTask.TOKENIZE).last
    assert (event.prompt_token_ids, event.num_prompt_tokens) == ([104, 195, 169], 3)
    assert serving.generate([104, 195, 169], task=GenerateTask.DETOKENIZE).text == "hé"


def test_stop_strings_end_and_are_left_out(serving: Serving) -> None:
    text = serving.generate("hello", LONG).text
    stop = text[10:13]
    result = serving.generate("hello", SamplingParameters(temperature=0.0, max_tokens=150, stop=[stop]))
    assert result.text == text[: text.index(stop)]
    assert (result.finish_reason, result.last.stop_reason) == (FinishReason.STOP, stop)


def test_stop_tokens_end_and_min_tokens_forbid_them(serving: Serving) -> None:
    ids = serving.generate(PROMPT).token_ids
    stop = ids[4]
    first = ids.index(stop)
    result = serving.generate(PROMPT, SamplingParameters(temperature=0.0, max_tokens=24, stop_token_ids=[stop]))
    assert (result.token_ids, result.last.stop_reason) == (ids[: first + 1], stop)
    late = SamplingParameters(temperature=0.0, max_tokens=24, stop_token_ids=[stop], min_tokens=first + 3)
    assert stop not in serving.generate(PROMPT, late).token_ids[: first + 2]


def test_seeds_repeat_in_any_crowd(serving: Serving) -> None:
    sampling = SamplingParameters(temperature=1.5, top_p=0.95, max_tokens=20, seed=42, ignore_eos=True)
    alone = serving.generate(PROMPT, sampling).token_ids
    crowd = [serving.submit([7] * count, LONG) for count in (3, 40, 80)]
    assert serving.generate(PROMPT, sampling).token_ids == alone
    assert len({tuple(serving.generate(PROMPT, SamplingParameters(max_tokens=20)).token_ids) for _ in range(3)}) == 3
    for request_id in crowd:
        serving.result(request_id)


def test_logprobs_are_those_of_transformers(serving: Serving) -> None:
    prompt = list(range(90))
    sampling = SamplingParameters(temperature=0.0, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    result = serving.generate(prompt, sampling)
    reference = make_reference(CONFIGS["llama"]())
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + result.token_ids])).logits[0]
    expected = torch.log_softmax(logits, dim=-1)
    for step, row in enumerate(result.logprobs):
        at = expected[len(prompt) - 1 + step]
        assert [one.token_id for one in row] == [result.token_ids[step], *at.topk(3).indices.tolist()]
        assert [one.logprob for one in row] == pytest.approx([float(at[one.token_id]) for one in row], abs=2e-4)
        assert row[0].rank == 1
    rows = result.events[0].prompt_logprobs
    assert rows is not None
    assert rows[0] is None
    assert len(rows) == len(prompt)
    for position, described in enumerate(rows[1:], start=1):
        assert described is not None
        at = expected[position - 1]
        assert described[0].token_id == prompt[position]
        assert [one.logprob for one in described] == pytest.approx(
            [float(at[one.token_id]) for one in described], abs=2e-4
        )


def test_prompt_logprobs_of_many_at_once(serving: Serving) -> None:
    sampling = SamplingParameters(temperature=0.0, max_tokens=2, prompt_logprobs=0)
    prompts = [list(range(start, start + 100)) for start in (0, 1, 2, 0)]
    for prompt, result in zip(prompts, serving.generate_all(prompts, sampling), strict=True):
        rows = result.events[0].prompt_logprobs
        assert rows is not None
        assert [row[0].token_id for row in rows[1:] if row] == prompt[1:]


# --- ends


def test_cancelling_ends_at_once_and_frees_all(serving: Serving) -> None:
    request_id = serving.submit(PROMPT, LONG)
    serving.next_event(request_id)
    serving.instance.cancel(request_id)
    result = serving.result(request_id)
    assert result.finish_reason is FinishReason.ABORT
    assert result.last.num_generated_tokens < 150
    serving.instance.cancel("unknown")


def test_cancelling_what_waits_or_is_being_tokenized(serving: Serving) -> None:
    text = "x" * 4000
    request_id = serving.submit(text, SamplingParameters(max_tokens=1), truncate_prompt_tokens=100)
    serving.instance.cancel(request_id)
    assert serving.result(request_id).finish_reason in (FinishReason.ABORT, FinishReason.LENGTH)


def test_a_deadline_ends_what_is_late(serving: Serving) -> None:
    passed = serving.generate(PROMPT, LONG, deadline_ns=time.monotonic_ns() - 1)
    assert isinstance(passed.last.error, DeadlineExceeded)
    assert passed.token_ids == []


def test_priorities_overtake(folder: Path) -> None:
    serving = Serving(folder, max_num_seqs=1)
    slow = serving.submit(PROMPT, LONG, priority=5)
    serving.next_event(slow)
    urgent = serving.submit([9] * 10, GREEDY, priority=0)
    assert serving.result(urgent).finish_reason is FinishReason.LENGTH
    assert serving.instance.llm.scheduler.num_preemptions == 1
    assert serving.result(slow).finish_reason is FinishReason.LENGTH
    serving.check()
    serving.close()


# --- what can't be


@pytest.mark.parametrize(
    ("prompt", "fields", "text"),
    [
        ([], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
        ([1] * 256, {}, "the prompt has 256 tokens, and the model's context of 256"),
        ([1] * 5000, {}, "the prompt has 5000 tokens"),
        ("x" * 5000, {}, "the prompt has 5000 tokens"),
        ([1] * 250, {}, "the model's context is 256 tokens, and 274 were asked for: 250 in the prompt and 24"),
        ([1, VOCAB], {}, f"the prompt has token id {VOCAB}, the vocabulary has ids 0 to {VOCAB - 1}"),
        ([1, -1], {}, "the prompt has token id -1"),
        ([1, "a"], {}, "must be text or token ids"),
        ([1, 1 << 70], {}, "must be text or token ids"),
        (PROMPT, {"sampling": SamplingParameters(temperature=-1.0)}, "'temperature'"),
        (PROMPT, {"sampling": SamplingParameters(min_tokens=9, max_tokens=3)}, "'min_tokens' 9"),
        (PROMPT, {"truncate_prompt_tokens": 0}, "'truncate_prompt_tokens'"),
        (ChatPrompt([]), {}, "at least one message"),
        (ChatPrompt([{"role": "user", "content": "x"}], chat_template="{% if %}"), {}, "error in line 1"),
        (PROMPT, {"task": GenerateTask.DETOKENIZE, "prompt_is": None}, ""),
    ],
)
def test_bad_requests_are_refused_and_harm_nobody(
    prompt: Any, fields: dict[str, Any], text: str, serving: Serving
) -> None:
    if "prompt_is" in fields:
        assert "a list of token ids is wanted" in refused(serving, "text", task=GenerateTask.DETOKENIZE)
        return
    neighbour = serving.submit([5] * 20, LONG)
    assert text in refused(serving, prompt, **fields)
    assert serving.result(neighbour).finish_reason is FinishReason.LENGTH


def test_adapters_are_not_there(serving: Serving) -> None:
    with pytest.raises(Unsupported, match="no adapter 'x'"):
        serving.submit(PROMPT, adapter="x")


def test_truncation_keeps_the_end(serving: Serving) -> None:
    long = [9] * 300 + PROMPT
    assert serving.generate(long, truncate_prompt_tokens=5).token_ids == serving.generate(PROMPT).token_ids
    assert serving.generate([9] * 300, truncate_prompt_tokens=-1).last.num_prompt_tokens == 256 - 24


def test_an_id_in_use_is_refused(serving: Serving) -> None:
    request_id = serving.submit(PROMPT, LONG)
    serving._num_requests -= 1
    serving.submit(PROMPT, LONG)
    events: list[TokenEvent] = []
    while sum(event.finish_reason is not None for event in events) < 2:
        events.append(serving.next_event(request_id))
    assert sum("in use" in str(event.error) for event in events) == 1


def test_a_full_queue_refuses_at_once(folder: Path) -> None:
    serving = Serving(folder, max_num_seqs=1, parameters={"max_waiting": "2"})
    results = serving.generate_all([[index] * 5 for index in range(20)], LONG)
    errors = [result.last.error for result in results if result.last.error]
    assert errors
    assert all(isinstance(error, Unavailable) and "2 requests waiting" in str(error) for error in errors)
    serving.check()
    serving.close()


def test_prompts_that_wait_to_be_tokenized_fill_the_queue_too(folder: Path) -> None:
    serving = Serving(folder, parameters={"max_waiting": "2"})
    may_tokenize = threading.Event()
    serving.instance._threads.submit(may_tokenize.wait, 60)
    long_text = "word " * 1000
    try:
        accepted = [serving.submit(long_text) for _ in range(2)]
        with pytest.raises(Unavailable, match="2 requests waiting"):
            serving.submit(long_text)
    finally:
        may_tokenize.set()
    for request_id in accepted:
        serving.result(request_id)
    serving.check()
    serving.close()


def test_more_tokens_than_the_memory_holds_are_refused_with_numbers(folder: Path) -> None:
    # two models of one engine: each is sure of half of the pages only
    first = Serving(folder, "first", kv_bytes=4 << 20, max_model_len=256)
    many = Serving(folder, "many", kv_bytes=4 << 20, parameters={"share_weight": "100"}, max_model_len=256)
    with pytest.raises(ResourceExhausted, match=r"need more KV memory than model 'first' has: it holds 0 tokens"):
        first.submit(PROMPT, LONG)
    many.close()
    assert first.generate(PROMPT, GREEDY).finish_reason is FinishReason.LENGTH
    first.close()


def test_a_failing_step_fails_its_requests_alone(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = serving.instance.llm.runner
    run = runner.run

    def fail(step: StepInput) -> StepOutput:
        if 66 in step.tokens:
            raise RuntimeError("a broken kernel")
        return run(step)

    monkeypatch.setattr(runner, "run", fail)
    before = serving.submit([1] * 10, GREEDY)
    serving.result(before)
    assert "a broken kernel" in str(serving.generate([66] * 40).last.error)
    monkeypatch.setattr(runner, "run", run)
    again = serving.generate([66] * 40)
    assert again.finish_reason is FinishReason.LENGTH
    assert again.last.num_cached_tokens == 0, "nothing of the failed step is found"


def test_logits_that_are_no_numbers_fail_one_request(folder: Path, tmp_path: Path) -> None:
    serving = Serving(folder)
    program = serving.instance.llm.runner._executor._program  # type: ignore[attr-defined]
    run = program.run

    def poison(step: Any, num_threads: int) -> None:
        run(step, num_threads)
        program.logits[0, 3] = float("nan")
        program.greedy[0] = 3

    program.run = poison
    result = serving.generate(PROMPT)
    assert "are not numbers" in str(result.last.error)
    program.run = run
    assert serving.generate(PROMPT).finish_reason is FinishReason.LENGTH
    serving.close()


def test_a_reader_that_stops_never_makes_the_engine_wait(serving: Serving) -> None:
    """`emit` only puts into a queue here, as the process host does: nobody takes anything until the end."""
    silent = [serving.submit([index] * 5, LONG) for index in range(8)]
    watched = serving.generate(PROMPT, LONG)
    assert watched.finish_reason is FinishReason.LENGTH
    for request_id in silent:
        assert len(serving.result(request_id).token_ids) == 150


def test_a_second_instance_is_refused(serving: Serving) -> None:
    from enginehouse.backend import Placement

    with pytest.raises(InvalidArgument, match="one instance serves all requests"):
        serving.model.create_instance(Placement("m_1_cpu"))


def test_metrics_have_vllms_names(serving: Serving) -> None:
    serving.generate(PROMPT)
    families = {family.name: family for family in serving.instance.metrics()}
    assert families["vllm:generation_tokens"].samples == [("_total", {"model_name": "m", "engine": "0"}, 24)]
    counts = {suffix: value for suffix, _, value in families["vllm:inter_token_latency_seconds"].samples}
    assert counts["_count"] == 23
    success = {labels["finished_reason"]: value for _, labels, value in families["vllm:request_success"].samples}
    assert success == {"stop": 0, "length": 1, "abort": 0, "error": 0}
    assert families["vllm:num_requests_running"].samples[0][2] == 0
