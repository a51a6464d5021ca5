"""Greedy tokens are transformers' own: alone, in a crowd, with prefix hits, chunks and preemption."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from enginehouse.types import SamplingParameters
from tests.acceptance.llm.serving import GREEDY, Serving
from tests.acceptance.llm.small_models import CONFIGS, VOCAB, make_reference, save_reference

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
NUM_TOKENS = 24
BLOCK_TOKENS = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in FAMILIES:
        folders[name] = tmp_path_factory.mktemp(name)
        save_reference(name, folders[name])
    return folders


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def reference(name: str) -> Any:
    return make_reference(CONFIGS[name]())


def expected(name: str, prompt: Sequence[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = reference(name).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def chosen_after(name: str, prompt: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """What the reference chooses after the prompt and each beginning of `tokens`: if that is `tokens`, it would have
    generated them. One pass instead of one a token.
    """
    with torch.inference_mode():
        logits = reference(name)(torch.tensor([[*prompt, *tokens]])).logits[0]
    chosen: list[int] = logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
    return chosen


def random_prompts(seed: int, count: int, longest: int = 150) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(VOCAB) for _ in range(source.randint(1, longest))] for _ in range(count)]


def serve(folders: dict[str, Path], family: str, **settings: Any) -> Iterator[Serving]:
    serving = Serving(folders[family], **settings)
    yield serving
    serving.check()
    serving.close()


@pytest.fixture
def serving(folders: dict[str, Path], family: str) -> Iterator[Serving]:
    yield from serve(folders, family, max_num_batched_tokens=48)


def test_one_at_a_time(serving: Serving, family: str) -> None:
    for prompt in random_prompts(1, 4):
        assert serving.generate(prompt).token_ids == expected(family, prompt)


def test_in_a_crowd_in_chunks(serving: Serving, family: str) -> None:
    prompts = random_prompts(2, 16)
    results = serving.generate_all(prompts)
    assert [result.token_ids for result in results] == [expected(family, prompt) for prompt in prompts]
    assert max(serving.steps) >= 6, "they did not run together"


def test_with_a_prefix_from_the_cache(serving: Serving, family: str) -> None:
    shared = random_prompts(3, 1)[0] * 3
    shared = (shared * 100)[: 4 * BLOCK_TOKENS]
    prompts = [shared + tail for tail in random_prompts(4, 6, longest=20)]
    first = serving.generate(prompts[0])
    others = serving.generate_all(prompts)
    assert first.last.num_cached_tokens == 0
    assert all(result.last.num_cached_tokens >= 4 * BLOCK_TOKENS for result in others)
    assert [result.token_ids for result in others] == [expected(family, prompt) for prompt in prompts]


def test_a_prefix_shared_by_requests_of_the_same_moment(serving: Serving, family: str) -> None:
    shared = (random_prompts(5, 1)[0] * 100)[: 4 * BLOCK_TOKENS]
    prompts = [shared + tail for tail in random_prompts(6, 6, longest=20)]
    results = serving.generate_all(prompts)
    assert sum(result.last.num_cached_tokens == 0 for result in results) == 1, "computed by one for all"
    assert [result.token_ids for result in results] == [expected(family, prompt) for prompt in prompts]


def test_with_preemption(folders: dict[str, Path], family: str) -> None:
    # 8 sequences would like 8 * (60 + 100) tokens of KV; there is memory for the longest and a bit
    for serving in serve(folders, family, kv_bytes=1 << 20, max_model_len=200):
        arena = serving.instance.engine.arena
        pool_tokens = arena.num_pages * arena.page_bytes // serving.instance.llm.runner.block_bytes * BLOCK_TOKENS
        sampling = SamplingParameters(temperature=0.0, max_tokens=100, ignore_eos=True)
        serving.instance.llm.scheduler.expected_output = 0.0  # admit all, and regret it
        count = pool_tokens // 80
        prompts = [prompt[:60] for prompt in random_prompts(7, count, longest=60)]
        results = serving.generate_all(prompts, sampling)
        assert serving.instance.llm.scheduler.num_preemptions > 0
        for prompt, result in zip(prompts, results, strict=True):
            assert len(result.token_ids) == 100
            assert result.token_ids == chosen_after(family, prompt, result.token_ids)


def test_without_prefix_caching(folders: dict[str, Path]) -> None:
    for serving in serve(folders, "llama", enable_prefix_caching=False):
        prompt = random_prompts(8, 1)[0]
        results = [serving.generate(prompt) for _ in range(2)]
        assert [result.token_ids for result in results] == [expected("llama", prompt)] * 2
        assert results[1].last.num_cached_tokens == 0


def test_to_the_end_of_the_context(folders: dict[str, Path]) -> None:
    for serving in serve(folders, "llama", max_model_len=64):
        prompt = random_prompts(9, 1)[0][:40] or [1]
        result = serving.generate(prompt, SamplingParameters(temperature=0.0, ignore_eos=True))
        assert len(result.token_ids) == 64 - len(prompt)
        assert result.finish_reason is not None
        assert result.finish_reason.value == "length"
        assert result.token_ids == expected("llama", prompt, 64 - len(prompt))


def test_greedy_is_what_the_default_sampling_is_not(folders: dict[str, Path]) -> None:
    for serving in serve(folders, "llama"):
        prompt = random_prompts(10, 1)[0]
        drawn = serving.generate(prompt, SamplingParameters(max_tokens=NUM_TOKENS, temperature=5.0, seed=1))
        assert drawn.token_ids != serving.generate(prompt, GREEDY).token_ids
