"""Which attention kernels a GPU's LLM uses: those that are quickest here, measured once when it is loaded.

A candidate must first give what the Triton kernels give, on random keys and values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from enginehouse.errors import Unsupported
from enginehouse_backends.llm.attention import KvShape
from enginehouse_backends.llm.attention.alternatives import ALTERNATIVES, why_not
from enginehouse_backends.llm.attention.triton_backend import DeviceStep, PagedKernels, TritonKernels
from enginehouse_backends.llm.attention.triton_paged import AttentionShape
from enginehouse_backends.llm.device_runtime import DeviceRuntime
from enginehouse_backends.llm.kernels.triton_rope import PagedKv
from enginehouse_backends.llm.runner import StepInput

logger = logging.getLogger(__name__)

REHEARSED_BLOCKS = 64
_TOLERANCE = 0.02
"""Relative, of results in 16 bits that are summed in another order."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A step with random queries, keys and values, like those that will come."""

    query: torch.Tensor
    cache: PagedKv
    make_step: Callable[[], DeviceStep]
    """Each time a new one: what a step keeps for itself counts."""
    shape: AttentionShape


def candidates(asked: str, shape: KvShape, dtype: torch.dtype) -> list[PagedKernels]:
    """Triton's first. asked: the setting `attention`; "" takes all that can be tried.

    Raises Unsupported with the reason if those that are asked for can't be.
    """
    found: list[PagedKernels] = [TritonKernels()]
    for kind in ALTERNATIVES:
        if asked not in ("", kind.name):
            continue
        reason = why_not(kind, shape, dtype)
        if not reason:
            try:
                found.append(kind())
            except Exception as error:  # a library that is installed and broken
                reason = f"importing it fails: {error!r}"
        if reason and asked:
            raise Unsupported(f"attention '{asked}' can't be used: {reason}")
        if reason:
            logger.debug("attention '%s' is left out: %s", kind.name, reason)
    return found


def choose(
    kernels: list[PagedKernels], rehearsal: Rehearsal, runtime: DeviceRuntime, forced: bool
) -> tuple[PagedKernels, str]:
    """The quickest, or the last if it is `forced`, and a sentence that says why."""
    if len(kernels) == 1:
        return kernels[0], kernels[0].name
    expected = _result(kernels[0], rehearsal, runtime)
    seconds: dict[PagedKernels, float] = {}
    notes: list[str] = []
    for each in kernels:
        try:
            wrong = _difference(_result(each, rehearsal, runtime), expected)
            if wrong > _TOLERANCE:
                raise Unsupported(f"it is off by {wrong:.3g}")
            seconds[each] = runtime.seconds(lambda each=each: _attend(each, rehearsal))  # type: ignore[misc]
            notes.append(f"{each.name} {1e6 * seconds[each]:.0f} us")
        except Exception as error:
            if forced and each is kernels[-1]:
                raise Unsupported(f"attention '{each.name}' can't be used: {error}") from error
            notes.append(f"{each.name} left out: {error}")
    best = kernels[-1] if forced else min(seconds, key=lambda each: seconds[each])
    return best, f"{best.name} ({', '.join(notes)})"


def describe(sentences: Mapping[str, str]) -> str:
    return "; ".join(f"{phase} by {sentence}" for phase, sentence in sentences.items())


def _attend(kernels: PagedKernels, rehearsal: Rehearsal) -> torch.Tensor:
    return kernels.attend(rehearsal.query, rehearsal.cache, rehearsal.make_step(), rehearsal.shape)


def _result(kernels: PagedKernels, rehearsal: Rehearsal, runtime: DeviceRuntime) -> torch.Tensor:
    found: list[torch.Tensor] = []
    runtime.launch(lambda: found.append(_attend(kernels, rehearsal)))
    runtime.synchronize()
    return found[0].float()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-9))


def rehearsed_step(tokens: int, count: int, longest: int, table: tuple[int, ...], block_places: int) -> StepInput:
    """`count` sequences of `longest` keys that compute `tokens` in all, over a few blocks that come again and again."""
    each, slots = tokens // count, np.arange(count, dtype=np.int32)
    block_table = np.zeros(table, dtype=np.int32)
    numbers = np.arange(count * table[1], dtype=np.int32).reshape(count, table[1])
    block_table[:count] = numbers % REHEARSED_BLOCKS * block_places
    length = each if count == 1 else longest
    positions = np.arange(length - each, length, dtype=np.int32)
    return StepInput(
        tokens=np.zeros(count * each, dtype=np.int32),
        positions=np.tile(positions, count),
        query_starts=np.arange(count + 1, dtype=np.int32) * each,
        context_lengths=np.full(count, length, dtype=np.int32),
        slots=slots,
        block_table=block_table,
        changed_slots=slots.tolist(),
        wanted_rows=np.zeros(0, dtype=np.int32),
        sampled=(),
        sampled_rows=np.zeros(0, dtype=np.int32),
    )
