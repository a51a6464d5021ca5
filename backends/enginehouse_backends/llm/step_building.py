"""A plan as the runner's arrays, and the block table that persists between steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.pooling import wanted_rows
from enginehouse_backends.llm.runner import FollowedToken, IntArray, StepInput
from enginehouse_backends.llm.scheduler import StepPlan

UNSEEN_TOKEN = 0
"""Stands where a token isn't known yet; runners don't read it."""


class BlockTable:
    """One row of places for each slot. `rows` keeps its address."""

    def __init__(self, num_slots: int, max_blocks: int, page_places: int, block_places: int, per_page: int) -> None:
        """Places are in attention.PLACE_BYTES: of a page, of a block; `per_page` blocks are in a page."""
        self.rows: IntArray = np.zeros((num_slots, max_blocks), dtype=np.int32)
        self._page_places, self._block_places, self._per_page = page_places, block_places, per_page
        self._changed: set[int] = set()

    def follow(self, generation: Generation, first: int) -> None:
        """The generation's blocks from `first` on are new."""
        row = self.rows[generation.slot]
        for index, block in enumerate(generation.blocks[first:], start=first):
            row[index] = self.place(block)
        self._changed.add(generation.slot)

    def place(self, block: int) -> int:
        page, index = divmod(block, self._per_page)
        return page * self._page_places + index * self._block_places

    def take_changed(self) -> list[int]:
        changed, self._changed = list(self._changed), set()
        return changed


def build_step(
    plan: StepPlan, table: BlockTable, running: Sequence[Generation] = (), pooling: str = ""
) -> StepInput:
    """`plan` has not run yet: its generations' computed tokens already count what it computes.

    running: those that a step that isn't finished samples, in its order; their newest tokens aren't known.
    pooling: the runner's.
    """
    step = _build(plan, table, running)
    if pooling:
        step.wanted_rows = wanted_rows(np.diff(step.query_starts), pooling)
    return step


def _build(plan: StepPlan, table: BlockTable, running: Sequence[Generation]) -> StepInput:
    if plan.num_tokens == len(plan.shares) and not any(wants_prompt_logprobs(g) for g, _ in plan.shares):
        return _build_single_tokens(plan, table, running)
    tokens: list[int] = []
    positions: list[IntArray] = []
    starts, lengths, slots = [0], [], []
    wanted: list[int] = []
    sampled: list[Generation] = []
    sampled_rows: list[int] = []
    followed: list[FollowedToken] = []
    unseen: list[tuple[int, int]] = []
    index_of = {generation: index for index, generation in enumerate(running)}
    for generation, count in plan.shares:
        stop = generation.num_computed
        start = stop - count
        tokens.extend(generation.tokens[start:stop])
        if stop > len(generation.tokens):
            unseen.append((len(tokens), index_of[generation]))
            tokens.append(UNSEEN_TOKEN)
        positions.append(np.arange(start, stop, dtype=np.int32))
        if wants_prompt_logprobs(generation):
            followed.extend(_follow_prompt(generation, start, stop, len(wanted)))
            wanted.extend(range(starts[-1], starts[-1] + min(stop, generation.num_prompt - 1) - start))
        if stop == generation.num_known:
            sampled.append(generation)
            sampled_rows.append(len(wanted))
            wanted.append(starts[-1] + count - 1)
        starts.append(starts[-1] + count)
        lengths.append(stop)
        slots.append(generation.slot)
    return StepInput(
        tokens=_ints(tokens),
        positions=np.concatenate(positions),
        query_starts=_ints(starts),
        context_lengths=_ints(lengths),
        slots=_ints(slots),
        block_table=table.rows,
        changed_slots=table.take_changed(),
        wanted_rows=_ints(wanted),
        sampled=sampled,
        sampled_rows=_ints(sampled_rows),
        followed=followed,
        unseen=unseen,
    )


def _build_single_tokens(plan: StepPlan, table: BlockTable, running: Sequence[Generation]) -> StepInput:
    """The common case: each generation computes one token."""
    generations = [generation for generation, _ in plan.shares]
    lengths = _ints([generation.num_computed for generation in generations])
    rows = np.arange(len(generations) + 1, dtype=np.int32)
    sampled = [generation for generation in generations if generation.num_left == 0]
    sampled_rows = rows[:-1]
    if len(sampled) < len(generations):
        sampled_rows = _ints([row for row, generation in enumerate(generations) if generation.num_left == 0])
    unseen: list[tuple[int, int]] = []
    if running:
        index_of = {generation: index for index, generation in enumerate(running)}
        unseen = [(row, index_of[g]) for row, g in enumerate(generations) if g.num_computed > len(g.tokens)]
        tokens = _ints([_last_token(generation) for generation in generations])
    else:
        tokens = _ints([generation.tokens[generation.num_computed - 1] for generation in generations])
    return StepInput(
        tokens=tokens,
        positions=lengths - 1,
        query_starts=rows,
        context_lengths=lengths,
        slots=_ints([generation.slot for generation in generations]),
        block_table=table.rows,
        changed_slots=table.take_changed(),
        wanted_rows=sampled_rows,
        sampled=sampled,
        sampled_rows=np.arange(len(sampled), dtype=np.int32),
        unseen=unseen,
    )


def _last_token(generation: Generation) -> int:
    """The last token that the step computes of it."""
    index = generation.num_computed - 1
    return generation.tokens[index] if index < len(generation.tokens) else UNSEEN_TOKEN


def wants_prompt_logprobs(generation: Generation) -> bool:
    """Of tokens that are computed in the coming step: only until the prompt is through."""
    return generation.sampling.prompt_logprobs is not None and generation.num_output == 0


def _follow_prompt(generation: Generation, start: int, stop: int, first_row: int) -> list[FollowedToken]:
    """For each prompt position in the chunk: which prompt token came after it."""
    count = generation.sampling.prompt_logprobs or 0
    last = min(stop, generation.num_prompt - 1)
    return [
        FollowedToken(first_row + position - start, generation.tokens[position + 1], count)
        for position in range(start, last)
    ]


def _ints(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int32)
