"""Two processes that share a model's weights give the tokens of one. On CPUs, joined by gloo."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from enginehouse.errors import InvalidArgument
from enginehouse.testing.server import ServerProcess
from enginehouse.types import SamplingParameters
from tests.acceptance.llm.serving import Serving
from tests.acceptance.llm.small_models import save_reference, save_tokenizer

FAMILIES = ("llama", "qwen2", "gemma2", "mixtral", "phi3", "quantizable")
PROMPTS = ([5, 250, 17, 3], list(range(20, 61)), [9] * 11)
GREEDY = SamplingParameters(temperature=0.0, max_tokens=12, ignore_eos=True)
PENALIZED = SamplingParameters(temperature=0.0, max_tokens=8, ignore_eos=True, repetition_penalty=1.4, logprobs=1)
SEEDED = SamplingParameters(temperature=1.2, top_k=30, seed=3, max_tokens=8, ignore_eos=True)


def tokens_of(folder: Path, **settings: Any) -> list[list[int]]:
    serving = Serving(folder, name=folder.name, **settings)
    try:
        results = [
            *serving.generate_all(PROMPTS, GREEDY),
            serving.generate(PROMPTS[1], PENALIZED),
            serving.generate(PROMPTS[0], SEEDED),
        ]
        serving.check()
        return [result.token_ids for result in results]
    finally:
        serving.close()


@pytest.mark.timeout(240)
def test_two_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    for name in FAMILIES:
        save_reference(name, tmp_path / name)
    rounded = {"quantizable": "int8"}
    alone = {name: tokens_of(tmp_path / name, quantization=rounded.get(name, "")) for name in FAMILIES}
    # the group's processes live as long as one of its models
    keeper = Serving(tmp_path / "llama", name="keeper", tensor_parallel_size=2)
    ranks = ranks_of(psutil.Process())
    together = {
        name: tokens_of(tmp_path / name, quantization=rounded.get(name, ""), tensor_parallel_size=2)
        for name in FAMILIES
    }
    keeper.close()
    # codes multiply inputs of 8 bits: a sum that differs in its last digit can fall to the next step
    together["quantizable"][3:] = alone["quantizable"][3:] = []
    assert together == alone
    assert len(ranks) == 1
    assert not ranks[0].is_running()


def test_heads_that_cannot_be_divided_are_refused_with_the_numbers(tmp_path: Path) -> None:
    save_reference("llama", tmp_path)
    with pytest.raises(InvalidArgument, match="4 heads, 2 of them with keys and values, and a width of 96"):
        Serving(tmp_path, tensor_parallel_size=3)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    save_reference("llama", tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    config = 'backend: "llm" instance_group { kind: KIND_CPU } serving { llm { tensor_parallel_size: 2 } }'
    (tmp_path / "llama" / "config.pbtxt").write_text(config)
    with ServerProcess([tmp_path]) as running:
        yield running


@pytest.mark.timeout(240)
def test_an_engine_whose_rank_dies_starts_again_whole(server: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "llama", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    before = client.completions.create(**asked).choices[0].text
    [rank] = ranks_of(psutil.Process(server.pid))
    rank.send_signal(signal.SIGKILL)
    rank.wait(10)
    deadline_s, after = time.monotonic() + 60, None
    while after is None and time.monotonic() < deadline_s:
        try:
            after = client.completions.create(**asked).choices[0].text
        except openai.APIError:
            time.sleep(0.2)
    assert after == before
    assert len(ranks_of(psutil.Process(server.pid))) == 1


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    children = process.children(recursive=True)
    return [child for child in children if "enginehouse_backends.llm.rank_process" in child.cmdline()]
