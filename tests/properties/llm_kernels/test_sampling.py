"""Sampling on the device against a plain reference: which tokens survive, and how often each is drawn."""

from __future__ import annotations

import pytest
import torch

from enginehouse_backends.llm.kernels.triton_sampling import NOT_A_NUMBER, SamplingRows, sample


def _rows(
    num_rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingRows:
    return SamplingRows(
        torch.full((num_rows,), temperature),
        torch.full((num_rows,), top_k, dtype=torch.int32),
        torch.full((num_rows,), top_p),
        torch.full((num_rows,), min_p),
        torch.arange(num_rows, dtype=torch.int64) * 7919 + 13,
    )


def _draw(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    out = torch.full((logits.shape[0],), -7, dtype=torch.int32)
    sample(logits, rows, out)
    return out


def _kept_probabilities(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """The distribution by sorting, in float64."""
    probabilities = (logits.double() / temperature).softmax(-1)
    probabilities[probabilities < min_p * probabilities.max()] = 0.0
    ordered, order = probabilities.sort(descending=True, stable=True)
    if top_k:
        ordered[top_k:] = 0.0
    before = ordered.cumsum(0) - ordered
    ordered[before >= top_p * ordered.sum()] = 0.0
    kept = torch.zeros_like(ordered).scatter(0, order, ordered)
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.1), (0.9, 6, 0.7, 0.05)],
    ids=["all", "top-k", "top-p", "min-p", "together"],
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    # fewer where thresholds are searched, which the interpreter is slow at
    num_draws, vocab_size = (60 if top_k or top_p < 1 else 300), 12
    logits = torch.randn(vocab_size) * 1.5
    rows = _rows(num_draws, temperature, top_k, top_p, min_p)
    tokens = _draw(logits.expand(num_draws, -1).contiguous(), rows)
    expected = _kept_probabilities(logits, temperature, top_k, top_p, min_p)
    observed = torch.bincount(tokens.long(), minlength=vocab_size).double()
    assert (observed[expected == 0] == 0).all(), "a token outside the kept set was drawn"
    kept = expected > 0
    wanted = expected[kept] * num_draws
    chi_square = float(((observed[kept] - wanted) ** 2 / wanted).sum())
    # mean = degrees of freedom, standard deviation sqrt(2 * that): five of them are one in a million
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * (2 * max(freedom, 1)) ** 0.5 + 5


@pytest.mark.parametrize("vocab_size", [50, 3000])
def test_top_k_of_one_is_the_maximum(vocab_size: int) -> None:
    logits = torch.randn(6, vocab_size)
    assert torch.equal(_draw(logits, _rows(6, 1.0, top_k=1)).long(), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_maximum_of_any_vocabulary(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 5000).to(dtype)
    logits[2, 4100] = logits[2, 130] = 9.0
    assert torch.equal(_draw(logits, _rows(5, 0.0)).long(), logits.float().argmax(-1))


def test_threshold_is_exact_among_many_near_equal_logits() -> None:
    vocab_size, top_k = 2500, 40
    logits = (torch.randperm(vocab_size).float() * 1e-4)[None].repeat(8, 1)
    allowed = set(logits[0].topk(top_k).indices.tolist())
    assert set(_draw(logits, _rows(8, 1.0, top_k=top_k)).tolist()) <= allowed


def test_masked_tokens_never_win_and_bad_rows_are_named() -> None:
    logits = torch.randn(3, 64)
    logits[0, torch.arange(64) != 17] = float("-inf")
    logits[1, 5] = float("nan")
    tokens = _draw(logits, _rows(3, 1.0, top_k=8))
    assert tokens[0] == 17
    assert tokens[1] == NOT_A_NUMBER


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    logits, rows = torch.randn(5, 300), _rows(5, 1.0, top_k=50, top_p=0.9)
    together = _draw(logits, rows)
    for index in range(5):
        one = slice(index, index + 1)
        alone = SamplingRows(
            rows.temperatures[one], rows.top_ks[one], rows.top_ps[one], rows.min_ps[one], rows.seeds[one]
        )
        assert _draw(logits[one], alone) == together[index]
