"""Sampling against a plain reference: what may come, how often, and that neighbours don't matter."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from enginehouse.types import SamplingParameters
from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.runner import FollowedToken, StepInput, StepOutput
from enginehouse_backends.llm.sampler import draw, row_logprobs, sample, uniform


def make_generation(prompt: Sequence[int] = (0,), output: Sequence[int] = (), **fields: Any) -> Generation:
    wanted = {name: fields.pop(name) for name in list(fields) if name in SamplingParameters.__dataclass_fields__}
    sampling = SamplingParameters(**wanted)
    tokens = array("i", [*prompt, *output])
    seed = fields.pop("seed_state", sampling.seed or 0)
    fields["stop_token_ids"] = fields.pop("ends", frozenset())
    return Generation("g", tokens, len(prompt), sampling, max_total=1000, seed=seed, **fields)


def run(logits: torch.Tensor, generations: Sequence[Generation], **fields: Any) -> StepOutput:
    """One row of logits for each generation."""
    rows = np.arange(len(generations), dtype=np.int32)
    none = np.zeros(0, dtype=np.int32)
    step = StepInput(
        tokens=none, positions=none, query_starts=none, context_lengths=none, slots=none, block_table=none[None],
        changed_slots=[], wanted_rows=rows, sampled=generations, sampled_rows=rows, **fields,
    )  # fmt: skip
    return sample(logits, None, step)


def choose(logits: Sequence[float], **fields: Any) -> int:
    return run(torch.tensor([logits]), [make_generation(**fields)]).token_ids[0]


def plain_probabilities(logits: Sequence[float], wanted: SamplingParameters) -> list[float]:
    """Written for reading, not for speed: temperature, top-k, min-p, top-p, in this order."""
    scaled = [value / wanted.temperature for value in logits]
    kept = set(range(len(scaled)))
    if wanted.top_k:
        worst = sorted(scaled, reverse=True)[wanted.top_k - 1]
        kept = {index for index in kept if scaled[index] >= worst}
    weights = [math.exp(value) if index in kept else 0.0 for index, value in enumerate(scaled)]
    most = max(weights)
    weights = [weight if weight >= wanted.min_p * most else 0.0 for weight in weights]
    total, so_far = sum(weights), 0.0
    nucleus = set()
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        if so_far < wanted.top_p * total:
            nucleus.add(index)
        so_far += weights[index]
    weights = [weight if index in nucleus else 0.0 for index, weight in enumerate(weights)]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 3},
        {"top_p": 0.3},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"top_k": 5, "top_p": 0.6, "temperature": 1.7},
        {"top_k": 6, "min_p": 0.05, "top_p": 0.95, "temperature": 0.8},
    ],
)
@pytest.mark.parametrize(("vocab", "num_draws"), [(8, 10_000), (1500, 2_000)])
def test_tokens_come_as_often_as_they_should(fields: dict[str, Any], vocab: int, num_draws: int) -> None:
    wanted = SamplingParameters(**{"temperature": 1.0, **fields})
    logits = -4.0 - 1e-3 * torch.arange(vocab)  # no ties: which of them top-p keeps is nobody's promise
    logits[-8:] = torch.tensor([2.0, 1.0, 0.5, 0.0, 1.5, -1.0, -2.0, 0.7])
    expected = plain_probabilities(logits.tolist(), wanted)
    generations = [make_generation(**fields, seed_state=seed) for seed in range(num_draws)]
    counts: Counter[int] = Counter()
    for start in range(0, num_draws, 1000):
        some = generations[start : start + 1000]
        counts.update(draw(logits.repeat(len(some), 1), some).tolist())
    assert all(expected[token] > 0 for token in counts), "a token came that may not come"
    # chi square over what is expected at least 5 times; 4.5 standard deviations fail once in 100,000 runs
    tested = [token for token in range(vocab) if expected[token] * num_draws >= 5]
    statistic = sum((counts[t] - expected[t] * num_draws) ** 2 / (expected[t] * num_draws) for t in tested)
    freedom = max(len(tested) - 1, 1)
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom) + 10


def test_top_p_over_a_flat_vocabulary_keeps_its_share() -> None:
    vocab, draws = 3000, 1500
    generations = [make_generation(top_p=0.5, seed_state=seed) for seed in range(draws)]
    drawn = [draw(torch.zeros(100, vocab), generations[start : start + 100]) for start in range(0, draws, 100)]
    distinct = set(torch.cat(drawn).tolist())
    # 1500 draws from 1500 equal tokens meet 1 - 1/e of them: 948; from all 3000 they would meet 1180
    assert 880 < len(distinct) < 1020


def test_temperature_zero_takes_the_largest() -> None:
    assert choose([0.0, 3.0, 2.0], temperature=0.0) == 1


@pytest.mark.parametrize(
    ("fields", "token"),
    [
        ({"logit_bias": {0: 5.0}}, 0),
        ({"logit_bias": {1: -100.0}}, 2),
        ({"allowed_token_ids": [0, 2]}, 2),
        ({"repetition_penalty": 2.0, "prompt": [1]}, 2),
        ({"repetition_penalty": 2.0, "prompt": [0], "output": [1]}, 2),
        ({"presence_penalty": 1.5, "output": [1]}, 2),
        ({"presence_penalty": 1.5, "prompt": [1]}, 1),
        ({"frequency_penalty": 0.6, "output": [1, 1]}, 2),
        ({"frequency_penalty": 0.6, "output": [1]}, 1),
        ({"bad_word_ids": [[1]]}, 2),
        ({"bad_word_ids": [[2, 1]], "output": [2]}, 2),
        ({"bad_word_ids": [[0, 1]], "output": [2]}, 1),
        ({"min_tokens": 1, "ends": frozenset([1])}, 2),
        ({"min_tokens": 1, "output": [0], "ends": frozenset([1])}, 1),
    ],
)
def test_wishes_change_the_choice(fields: dict[str, Any], token: int) -> None:
    assert choose([0.0, 3.0, 2.0], temperature=0.0, **fields) == token


def test_a_negative_logit_is_repeated_less_too() -> None:
    assert choose([-1.0, -1.5], temperature=0.0, repetition_penalty=2.0, prompt=[0]) == 1


def test_seed_and_position_make_the_token_whoever_is_beside() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(1)) * 2
    for fields in ({"top_p": 0.9}, {"top_k": 20}, {}, {"min_p": 0.1, "temperature": 1.3}):
        alone = [run(logits, [make_generation(seed=3, output=[1] * step, **fields)]).token_ids[0] for step in range(50)]
        others = torch.randn(7, 500)
        for step, token in enumerate(alone):
            crowd = [make_generation(seed=step, top_p=0.5) for _ in range(7)]
            mine = make_generation(seed=3, output=[1] * step, **fields)
            mixed = run(torch.cat([others[:4], logits, others[4:]]), [*crowd[:4], mine, *crowd[4:]])
            assert mixed.token_ids[4] == token
        assert len(set(alone)) > 3


def test_seeds_are_independent() -> None:
    numbers = uniform(range(1000), [0] * 1000)
    shifted = uniform(range(1000), [1] * 1000)
    assert abs(np.corrcoef(numbers, shifted)[0, 1]) < 0.1
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.1
    assert abs(float(numbers.mean()) - 0.5) < 0.03
    assert 0 <= float(numbers.min()) <= float(numbers.max()) < 1


def test_logits_that_are_no_numbers_are_told_row_by_row() -> None:
    logits = torch.zeros(3, 10)
    logits[1, 4] = float("nan")
    generations = [make_generation(temperature=0.0), make_generation(temperature=0.0), make_generation(seed=1)]
    ids = run(logits, generations).token_ids
    assert ids[0] == 0
    assert ids[1] == -1
    assert ids[2] >= 0
    logits[2, 9] = float("nan")
    assert run(logits, generations).token_ids[2] == -1


def test_logprobs_are_of_the_unchanged_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    expected = torch.log_softmax(logits[0], dim=-1)
    output = run(logits, [make_generation(temperature=0.0, logprobs=2, logit_bias={0: 50.0})])
    row = output.logprobs[0]
    assert row is not None
    assert (row.token_id, row.rank, list(row.top_ids)) == (0, 3, [2, 1])
    assert row.logprob == pytest.approx(float(expected[0]))
    assert row.top_logprobs == pytest.approx([float(expected[2]), float(expected[1])])


def test_followed_tokens_are_rated() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    output = run(logits, [make_generation(), make_generation()], followed=[FollowedToken(1, 0, 1)])
    assert output.followed == [row_logprobs(logits[1], 0, 1)]
    assert output.followed[0].rank == 1
