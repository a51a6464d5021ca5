"""One buffer for all that a step tells the device: where each array lies in it, and how a step fills it. Pure.

The host writes a pinned buffer, one copy brings it over, and kernels read views of the device's buffer. Sizes are
those of a bucket: what a step leaves over is padding that changes no result (negative sequences, no wanted rows).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from enginehouse_backends.llm.runner import IntArray, StepInput

PADDING = -1


def batch_buckets(most: int) -> list[int]:
    """Batch sizes that get a graph of their own: doubling at first, then by steps that waste at most an eighth."""
    sizes = [size for size in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32) if size < most]
    size = 40
    while size < most:
        sizes.append(size)
        size += max(size // 8 // 8 * 8, 8)
    return [*sizes, most]


def bucket_for(size: int, buckets: Sequence[int]) -> int | None:
    """The least bucket that holds `size`, None if none does."""
    index = bisect.bisect_left(buckets, size)
    return buckets[index] if index < len(buckets) else None


@dataclass(frozen=True, slots=True)
class StepSizes:
    """How much room a step has. `tiles` counts prefill's programs, `decodes` sequences with a single token."""

    tokens: int
    sequences: int
    wanted: int
    decodes: int
    tiles: int

    @classmethod
    def of_decoding(cls, bucket: int) -> StepSizes:
        """Every sequence computes one token and wants its logits."""
        return cls(bucket, bucket, bucket, bucket, 0)


_FIELDS = (
    ("tokens", "tokens", 1),
    ("token_sources", "tokens", 1),
    ("positions", "tokens", 1),
    ("token_sequences", "tokens", 1),
    ("query_starts", "sequences", 1),
    ("last_start", "", 1),
    ("context_lengths", "sequences", 1),
    ("table_rows", "sequences", 1),
    ("decode_sequences", "decodes", 1),
    ("wanted_rows", "wanted", 1),
    ("temperatures", "wanted", 1),
    ("top_ks", "wanted", 1),
    ("top_ps", "wanted", 1),
    ("min_ps", "wanted", 1),
    ("seeds", "wanted", 2),
    ("tiles", "tiles", 2),
)
"""Name, which of StepSizes counts it (once if none), and words each. `last_start` ends query_starts."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Offsets in 32-bit words of each array. seeds are 64-bit and lie at an even word."""

    sizes: StepSizes
    places: dict[str, tuple[int, int]]
    """First word and number of words."""
    num_words: int

    @classmethod
    def of(cls, sizes: StepSizes) -> StepLayout:
        places, word = {}, 0
        for name, counted_by, words_each in _FIELDS:
            count = getattr(sizes, counted_by) if counted_by else 1
            word += word % words_each
            places[name] = (word, count * words_each)
            word += count * words_each
        return cls(sizes, places, word)

    def words(self, buffer: IntArray, name: str) -> IntArray:
        first, count = self.places[name]
        return buffer[first : first + count]


@dataclass(frozen=True, slots=True)
class SampledRow:
    """How the token of a wanted row is chosen on the device. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


def fill_step(
    layout: StepLayout,
    buffer: IntArray,
    step: StepInput,
    sources: IntArray,
    rows: Sequence[SampledRow],
    tiles: Sequence[tuple[int, int]],
) -> None:
    """Writes a step into `buffer` [num_words] of int32, padding included.

    sources: [T] row of the previous step's samples that a token comes from, PADDING where it is given · rows: one
    for each wanted row · tiles: of sequences with several tokens.
    """
    sizes, counts = layout.sizes, np.diff(step.query_starts)
    num_tokens, num_sequences, num_wanted = len(step.tokens), len(counts), len(step.wanted_rows)
    assert num_tokens <= sizes.tokens, "bug: the step has more tokens than its bucket"
    assert num_sequences <= sizes.sequences, "bug: the step has more sequences than its bucket"

    def put(name: str, values: npt.ArrayLike, rest: int) -> None:
        words = layout.words(buffer, name)
        given = np.asarray(values)
        words[: given.size] = given
        words[given.size :] = rest

    put("tokens", step.tokens, 0)
    put("token_sources", sources, PADDING)
    put("positions", step.positions, 0)
    put("token_sequences", np.repeat(np.arange(num_sequences, dtype=np.int32), counts), PADDING)
    put("query_starts", step.query_starts[:-1], num_tokens)
    put("last_start", step.query_starts[-1:], num_tokens)
    put("context_lengths", step.context_lengths, 0)
    put("table_rows", step.slots, 0)
    put("decode_sequences", np.flatnonzero(counts == 1) if sizes.tiles else np.arange(num_sequences), PADDING)
    put("wanted_rows", step.wanted_rows, 0)
    put("tiles", np.array(tiles, dtype=np.int32).reshape(-1), PADDING)
    _fill_sampling(layout, buffer, rows, num_wanted)


def _fill_sampling(layout: StepLayout, buffer: IntArray, rows: Sequence[SampledRow], num_wanted: int) -> None:
    assert len(rows) == num_wanted, "bug: each wanted row needs its sampling"
    floats = {name: layout.words(buffer, name).view(np.float32) for name in ("temperatures", "top_ps", "min_ps")}
    seeds = layout.words(buffer, "seeds").view(np.int64)
    top_ks = layout.words(buffer, "top_ks")
    floats["temperatures"][:] = 0.0
    for index, row in enumerate(rows):
        if row.temperature == 0.0:
            continue
        floats["temperatures"][index], top_ks[index] = row.temperature, row.top_k
        floats["top_ps"][index], floats["min_ps"][index], seeds[index] = row.top_p, row.min_p, row.seed
