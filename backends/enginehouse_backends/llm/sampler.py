"""From logits to tokens, for all rows at once: biases, penalties, temperature, top-k, top-p, min-p.

A row's randomness is one number made of its seed and its position, and its arithmetic doesn't see the other
rows: a seeded request gives the same tokens in any batch. Greedy rows without wishes are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.runner import FollowedToken, IntArray, RowLogprobs, StepInput, StepOutput

_FEW = 1024
"""top-p looks at so many of the likeliest tokens before it sorts the whole vocabulary."""
_SPAN = 512
"""Tokens whose probabilities are summed together before the running sum."""
_NEVER = float("-inf")


def sample(logits: torch.Tensor, greedy: torch.Tensor | None, step: StepInput) -> StepOutput:
    """`logits`: [R, vocab] float32 of the wanted rows; `greedy`: [R] their largest, if known already."""
    generations = step.sampled
    if greedy is not None and not step.followed and all(generation.only_likeliest for generation in generations):
        return StepOutput(_likeliest(logits, greedy, step), ())
    logprobs: list[RowLogprobs | None] = []
    token_ids: list[int] = []
    if generations:
        token_ids = _choose(logits, greedy, step).tolist()
        if any(generation.sampling.logprobs is not None for generation in generations):
            logprobs = _sampled_logprobs(logits, step, token_ids)
    return StepOutput(token_ids, logprobs, _followed_logprobs(logits, step.followed))


def _likeliest(logits: torch.Tensor, greedy: torch.Tensor, step: StepInput) -> list[int]:
    """As `_choose`, in numpy: for a token or two a call of torch costs more than the work."""
    rows = step.sampled_rows
    chosen = greedy.numpy()[rows]
    is_number = np.isfinite(logits.numpy()[rows, chosen])
    token_ids: list[int] = np.where(is_number, chosen, -1).tolist()
    return token_ids


def _choose(logits: torch.Tensor, greedy: torch.Tensor | None, step: StepInput) -> torch.Tensor:
    rows = torch.from_numpy(step.sampled_rows).long()
    if greedy is None:
        greedy = logits.argmax(dim=-1)
    chosen = greedy[rows].long()
    is_number = logits[rows, chosen].isfinite()
    wishing = [index for index, generation in enumerate(step.sampled) if not is_plain_greedy(generation)]
    if wishing:
        some = torch.tensor(wishing)
        changed = logits[rows[some]]
        generations = [step.sampled[index] for index in wishing]
        for row, generation in enumerate(generations):
            apply_wishes(changed[row], generation)
        chosen[some] = _choose_changed(changed, generations)
        is_number[some] &= ~changed.isnan().any(dim=-1)
    return torch.where(is_number, chosen, -1)


def is_plain_greedy(generation: Generation) -> bool:
    return generation.sampling.temperature == 0 and not has_wishes(generation)


def has_wishes(generation: Generation) -> bool:
    """Whether the logits are changed before a token is chosen."""
    return generation.changes_logits or generation.num_output < generation.sampling.min_tokens


def apply_wishes(row: torch.Tensor, generation: Generation) -> None:
    """Changes one row of logits [vocab] in place: what must not, should or should rather not come."""
    wanted = generation.sampling
    if wanted.allowed_token_ids is not None:
        kept = torch.tensor(list(wanted.allowed_token_ids), dtype=torch.long)
        values = row[kept]
        row.fill_(_NEVER)
        row[kept] = values
    if generation.bad_word_ids:
        row[_forbidden_by_bad_words(generation)] = _NEVER
    if generation.num_output < wanted.min_tokens and generation.stop_token_ids:
        row[list(generation.stop_token_ids)] = _NEVER
    if wanted.logit_bias:
        row[list(wanted.logit_bias)] += torch.tensor(list(wanted.logit_bias.values()), dtype=row.dtype)
    _penalize(row, generation)


def _forbidden_by_bad_words(generation: Generation) -> list[int]:
    """Tokens that would complete a bad word now."""
    tokens, forbidden = generation.tokens, []
    for word in generation.bad_word_ids:
        before = list(word[:-1])
        start = len(tokens) - len(before)
        if start >= generation.num_prompt - len(before) and start >= 0 and list(tokens[start:]) == before:
            forbidden.append(word[-1])
    return forbidden


def _penalize(row: torch.Tensor, generation: Generation) -> None:
    wanted = generation.sampling
    if wanted.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(np.asarray(generation.tokens, dtype=np.int64)))
        values = row[seen]
        row[seen] = torch.where(values > 0, values / wanted.repetition_penalty, values * wanted.repetition_penalty)
    if wanted.frequency_penalty or wanted.presence_penalty:
        output = np.asarray(generation.tokens[generation.num_prompt :], dtype=np.int64)
        ids, counts = np.unique(output, return_counts=True)
        minus = wanted.frequency_penalty * counts + wanted.presence_penalty
        row[torch.from_numpy(ids)] -= torch.from_numpy(minus.astype(np.float32))


def _choose_changed(logits: torch.Tensor, generations: Sequence[Generation]) -> torch.Tensor:
    chosen = logits.argmax(dim=-1)
    random = [row for row, generation in enumerate(generations) if generation.sampling.temperature > 0]
    if random:
        rows = torch.tensor(random)
        chosen[rows] = draw(logits[rows], [generations[row] for row in random])
    return chosen


def draw(logits: torch.Tensor, generations: Sequence[Generation]) -> torch.Tensor:
    """One token a row at random, by temperature, top-k, min-p and top-p. [rows, vocab] → [rows]"""
    wanted = [generation.sampling for generation in generations]
    temperatures = torch.tensor([one.temperature for one in wanted], dtype=torch.float32)
    logits = logits / temperatures[:, None]
    _keep_top_k(logits, [one.top_k for one in wanted])
    _keep_min_p(logits, [one.min_p for one in wanted])
    uniforms = torch.from_numpy(uniform([g.seed for g in generations], [g.num_output for g in generations]))
    chosen = torch.empty(len(generations), dtype=torch.long)
    nucleus = [row for row, one in enumerate(wanted) if one.top_p < 1]
    whole = [row for row, one in enumerate(wanted) if one.top_p >= 1]
    if whole:
        chosen[whole] = _draw_whole(logits[whole], uniforms[whole])
    if nucleus:
        top_p = torch.tensor([wanted[row].top_p for row in nucleus])
        chosen[nucleus] = _draw_nucleus(logits[nucleus], top_p, uniforms[nucleus])
    return chosen


def _keep_top_k(logits: torch.Tensor, top_k: Sequence[int]) -> None:
    vocab = logits.shape[-1]
    rows = [row for row, k in enumerate(top_k) if 0 < k < vocab]
    if not rows:
        return
    most = max(top_k[row] for row in rows)
    best = logits[rows].topk(most, dim=-1).values
    last = best.gather(1, torch.tensor([[top_k[row] - 1] for row in rows]))
    some = logits[rows]
    logits[rows] = some.masked_fill_(some < last, _NEVER)


def _keep_min_p(logits: torch.Tensor, min_p: Sequence[float]) -> None:
    rows = [row for row, p in enumerate(min_p) if p > 0]
    if not rows:
        return
    some = logits[rows]
    least = some.max(dim=-1, keepdim=True).values + torch.tensor([[min_p[row]] for row in rows]).log()
    logits[rows] = some.masked_fill_(some < least, _NEVER)


def _draw_whole(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse of the running sum in the order of ids, first over spans of the vocabulary, then inside one."""
    weights = (logits - logits.max(dim=-1, keepdim=True).values).exp_()
    rows, vocab = weights.shape
    spans = torch.nn.functional.pad(weights, (0, -vocab % _SPAN)).view(rows, -1, _SPAN)
    sums = spans.sum(dim=-1).double().cumsum(dim=-1)
    targets = (uniforms * sums[:, -1])[:, None]
    span = torch.searchsorted(sums, targets, right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(span > 0, sums.gather(1, (span - 1).clamp(min=0)), 0.0)
    inside = spans[torch.arange(rows), span[:, 0]].double()
    offset = _first_above(inside, targets - before)
    return span[:, 0] * _SPAN + offset


def _first_above(weights: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The first index at which the running sum exceeds the target; the last possible one by rounding."""
    index = torch.searchsorted(weights.cumsum(dim=-1), targets, right=True)[:, 0]
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).long().argmax(dim=-1)
    return torch.minimum(index, last)


def _draw_nucleus(logits: torch.Tensor, top_p: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """From the fewest likeliest tokens whose probabilities reach top_p together."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    count = min(_FEW, logits.shape[-1])
    values, ids = logits.topk(count, dim=-1)
    chosen = _draw_sorted((values - total).exp_().double(), ids, top_p, uniforms)
    for row in (chosen < 0).nonzero()[:, 0].tolist():  # flat: the few hold too little
        sorted_values, sorted_ids = logits[row].sort(descending=True, stable=True)
        weights = (sorted_values - total[row]).exp_().double()[None]
        chosen[row] = _draw_sorted(weights, sorted_ids[None], top_p[row : row + 1], uniforms[row : row + 1], True)[0]
    return chosen


def _draw_sorted(
    weights: torch.Tensor, ids: torch.Tensor, top_p: torch.Tensor, uniforms: torch.Tensor, whole: bool = False
) -> torch.Tensor:
    """`weights`: [rows, n] descending probabilities of `ids`. -1 where n tokens don't reach top_p."""
    sums = weights.cumsum(dim=-1)
    kept = sums - weights < top_p[:, None].double()
    enough = ~kept[:, -1] | (weights[:, -1] == 0) | whole | (weights.shape[-1] < _FEW)
    weights = weights * kept
    targets = (uniforms * weights.sum(dim=-1))[:, None]
    chosen = ids.gather(1, _first_above(weights, targets)[:, None])[:, 0]
    return torch.where(enough, chosen, -1)


def row_seeds(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.int64]:
    """A 64-bit number for each (seed, position), for generators that make their own draws of it."""
    return _bits(seeds, positions).view(np.int64)


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position): SplitMix64's output function, twice."""
    return (_bits(seeds, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _bits(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.uint64]:
    states = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = _mix(states + np.uint64(0x9E3779B97F4A7C15))
        steps = np.array(positions, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
        bits: npt.NDArray[np.uint64] = _mix(mixed + steps)
    return bits


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _sampled_logprobs(logits: torch.Tensor, step: StepInput, token_ids: Sequence[int]) -> list[RowLogprobs | None]:
    rows: IntArray = step.sampled_rows
    found: list[RowLogprobs | None] = []
    for index, generation in enumerate(step.sampled):
        count = generation.sampling.logprobs
        if count is None or token_ids[index] < 0:
            found.append(None)
        else:
            found.append(row_logprobs(logits[int(rows[index])], token_ids[index], count))
    return found


def _followed_logprobs(logits: torch.Tensor, followed: Sequence[FollowedToken]) -> list[RowLogprobs]:
    return [row_logprobs(logits[token.row], token.token_id, token.num_top) for token in followed]


def row_logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> RowLogprobs:
    """Of one row [vocab]; `num_top` of -1 gives the whole vocabulary."""
    total = logits.logsumexp(dim=-1)
    own = logits[token_id]
    rank = int((logits > own).sum()) + 1
    count = logits.shape[-1] if num_top < 0 else min(num_top, logits.shape[-1])
    values, ids = logits.topk(count)
    return RowLogprobs(token_id, float(own - total), rank, ids.tolist(), (values - total).tolist())
