"""Triton kernel that chooses a token of each row on the device: greedy, top-k, top-p, min-p and temperature.

Nothing is sorted. A token's key is the bit pattern of its distance below the row's maximum, which orders as
an integer; the tokens that a setting keeps are those up to a threshold key, and thresholds are found by
narrowing an interval with eight pivots a pass. Ties at a threshold are all kept. The choice itself is the
exponential race (each kept token draws -log(u) / p, the least wins), so one pass samples exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

NOT_A_NUMBER = -1
"""The token id of a row whose logits are not numbers."""

_INFINITY_KEY = tl.constexpr(0x7F800000)
_PIVOTS = tl.constexpr(8)


@triton.jit
def _keys(row, first, maximum, inverse_temperature, vocab_size, BLOCK: tl.constexpr):
    """Keys of a chunk, and its distances: 0 for the maximum, infinity outside the vocabulary."""
    columns = first + tl.arange(0, BLOCK)
    logits = tl.load(row + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
    distance = tl.maximum((maximum - logits) * inverse_temperature, 0.0)
    return distance.to(tl.int32, bitcast=True), distance


@triton.jit
def _measure(row, maximum, inverse_temperature, vocab_size, pivots, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens, or how much unnormalised probability, lie at or below each pivot."""
    found = tl.zeros([_PIVOTS], tl.float32)
    for first in range(0, vocab_size, BLOCK):
        keys, distance = _keys(row, first, maximum, inverse_temperature, vocab_size, BLOCK)
        weight = (keys < _INFINITY_KEY).to(tl.float32)
        if BY_MASS:
            weight = tl.exp(-distance)
        found += tl.sum(tl.where(keys[:, None] <= pivots[None, :], weight[:, None], 0.0), axis=0)
    return found


@triton.jit
def _threshold(
    row, maximum, inverse_temperature, vocab_size, limit, target, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """The least key up to `limit` at which count or mass reaches `target`; `limit` if none does."""
    low = -1
    high = limit
    while high - low > 1:
        step = tl.maximum((high - low) // _PIVOTS, 1)
        pivots = tl.minimum(low + step * (tl.arange(0, _PIVOTS) + 1), high - 1)
        found = _measure(row, maximum, inverse_temperature, vocab_size, pivots, BY_MASS, BLOCK)
        enough = found >= target
        high = tl.minimum(high, tl.min(tl.where(enough, pivots, high), axis=0))
        low = tl.maximum(low, tl.max(tl.where(enough, low, pivots), axis=0))
    return high


@triton.jit
def _greatest(row, vocab_size, BLOCK: tl.constexpr):
    """The row's maximum, its first index, and whether anything is not a number."""
    maximum = float("-inf")
    index = 0
    bad = 0
    for first in range(0, vocab_size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(row + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
        bad = tl.maximum(bad, tl.max((logits != logits).to(tl.int32), axis=0))
        chunk_maximum, chunk_index = tl.max(logits, axis=0, return_indices=True)
        index = tl.where(chunk_maximum > maximum, first + chunk_index, index)
        maximum = tl.maximum(maximum, chunk_maximum)
    return maximum, index, bad


@triton.jit
def _race(row, maximum, inverse_temperature, vocab_size, threshold, seed, BLOCK: tl.constexpr):
    """The winner among tokens whose key is at most `threshold`."""
    best = float("inf")
    winner = 0
    for first in range(0, vocab_size, BLOCK):
        keys, distance = _keys(row, first, maximum, inverse_temperature, vocab_size, BLOCK)
        uniform = tl.rand(seed, first + tl.arange(0, BLOCK))
        # -log(1 - u); for small u by its series, where 1 - u would round the draw away.
        draw = tl.where(uniform < 0.001, uniform * (1.0 + 0.5 * uniform), -tl.log(1.0 - tl.maximum(uniform, 0.001)))
        finish = tl.log(tl.maximum(draw, 1e-30)) + distance
        finish = tl.where((keys <= threshold) & (keys < _INFINITY_KEY), finish, float("inf"))
        chunk_best, chunk_index = tl.min(finish, axis=0, return_indices=True)
        winner = tl.where(chunk_best < best, first + chunk_index, winner)
        best = tl.minimum(best, chunk_best)
    return winner


@triton.jit
def _sample_kernel(
    logits, out, temperatures, top_ks, top_ps, min_ps, seeds, row_stride, vocab_size, BLOCK: tl.constexpr
):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * row_stride
    maximum, token, bad = _greatest(row, vocab_size, BLOCK)
    temperature = tl.load(temperatures + index)
    if (temperature > 0.0) & (bad == 0) & (maximum > float("-inf")):
        inverse_temperature = 1.0 / temperature
        top_k = tl.load(top_ks + index)
        top_p = tl.load(top_ps + index)
        min_p = tl.load(min_ps + index)
        threshold = tl.full([], 0x7F800000, tl.int32)
        if min_p > 0.0:
            threshold = (-tl.log(min_p)).to(tl.int32, bitcast=True)
        if (top_k > 0) & (top_k < vocab_size):
            threshold = _threshold(
                row, maximum, inverse_temperature, vocab_size, threshold, top_k.to(tl.float32), False, BLOCK
            )
        if top_p < 1.0:
            pivots = tl.zeros([_PIVOTS], tl.int32) + threshold
            kept = tl.max(_measure(row, maximum, inverse_temperature, vocab_size, pivots, True, BLOCK), axis=0)
            threshold = _threshold(row, maximum, inverse_temperature, vocab_size, threshold, top_p * kept, True, BLOCK)
        token = _race(row, maximum, inverse_temperature, vocab_size, threshold, tl.load(seeds + index), BLOCK)
    tl.store(out + index, tl.where(bad > 0, -1, token))


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Settings of each row, on the device: [rows] each. Temperature 0 is greedy; top_k 0 keeps all.

    seeds: int64, different for every token of a sequence; equal seeds and logits give equal tokens whatever
    else is in the batch.
    """

    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    seeds: torch.Tensor


def sample(logits: torch.Tensor, rows: SamplingRows, out: torch.Tensor) -> None:
    """logits: [rows, vocab], last axis contiguous → out: [rows] int32; NOT_A_NUMBER marks a bad row.

    Top-k first, then top-p of what it left, as the other engines do; min-p is relative to the maximum.
    """
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    block = min(triton.next_power_of_2(vocab_size), 2048)
    _sample_kernel[(num_rows,)](
        logits,
        out,
        rows.temperatures,
        rows.top_ks,
        rows.top_ps,
        rows.min_ps,
        rows.seeds,
        logits.stride(0),
        vocab_size,
        BLOCK=block,
        num_warps=8,
    )
