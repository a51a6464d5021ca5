"""Which rows of a step the device samples, and what the host does with the others.

Temperature, top-k, top-p and min-p are the device's; logit wishes (penalties, biases, bad words) and logprobs are
the host's, by sampler.py on a copy of those rows' logits. A generation's own settings decide, never its company,
so a seeded request gives the same tokens in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.runner import IntArray, RowLogprobs, StepInput, StepOutput
from enginehouse_backends.llm.sampler import has_wishes, row_seeds, sample
from enginehouse_backends.llm.step_layout import SampledRow

_GREEDY = SampledRow()


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """rows: settings of each wanted row · host_rows: wanted rows whose logits the host needs, ascending."""

    rows: list[SampledRow]
    host_rows: IntArray
    host_samples: list[int]
    """Indices into the step's `sampled` whose tokens the host chooses."""


def is_for_host(generation: Generation) -> bool:
    return generation.sampling.logprobs is not None or has_wishes(generation)


def plan_sampling(step: StepInput) -> SamplingPlan:
    host_samples = [index for index, generation in enumerate(step.sampled) if is_for_host(generation)]
    host_rows = {int(step.sampled_rows[index]) for index in host_samples} | {token.row for token in step.followed}
    rows = [_GREEDY] * len(step.wanted_rows)
    on_device = set(range(len(step.sampled))).difference(host_samples)
    random = [index for index in sorted(on_device) if step.sampled[index].sampling.temperature > 0]
    if random:
        generations = [step.sampled[index] for index in random]
        # a token that is still on its way counts: positions are those of the output
        seeds = row_seeds([g.seed for g in generations], [g.num_output + g.num_unseen for g in generations])
        for index, generation, seed in zip(random, generations, seeds.tolist(), strict=True):
            wanted = generation.sampling
            rows[int(step.sampled_rows[index])] = SampledRow(
                wanted.temperature, max(wanted.top_k, 0), wanted.top_p, wanted.min_p, seed
            )
    return SamplingPlan(rows, np.array(sorted(host_rows), dtype=np.int32), host_samples)


def merge(step: StepInput, plan: SamplingPlan, chosen: IntArray, host_logits: torch.Tensor) -> StepOutput:
    """chosen: [R] the device's tokens by wanted row · host_logits: [host rows, vocab] float32 on the host."""
    token_ids = chosen[step.sampled_rows].tolist() if len(step.sampled) else []
    if not len(plan.host_rows):
        return StepOutput(token_ids, [])
    place = {row: index for index, row in enumerate(plan.host_rows.tolist())}
    own = replace(
        step,
        sampled=[step.sampled[index] for index in plan.host_samples],
        sampled_rows=np.array([place[int(step.sampled_rows[index])] for index in plan.host_samples], dtype=np.int32),
        followed=[replace(token, row=place[token.row]) for token in step.followed],
    )
    found = sample(host_logits, None, own)
    logprobs: list[RowLogprobs | None] = []
    if found.logprobs:
        logprobs = [None] * len(step.sampled)
    for position, index in enumerate(plan.host_samples):
        token_ids[index] = found.token_ids[position]
        if found.logprobs:
            logprobs[index] = found.logprobs[position]
    return StepOutput(token_ids, logprobs, found.followed)


def token_sources(step: StepInput, previous_rows: Sequence[int] | IntArray) -> IntArray:
    """[T] for step_layout.fill_step: the wanted row of the previous step that an unseen token was sampled at."""
    sources = np.full(len(step.tokens), -1, dtype=np.int32)
    for row, index in step.unseen:
        sources[row] = previous_rows[index]
    return sources
