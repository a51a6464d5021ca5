"""What runs a planned step: the only place where an engine's plan becomes tensors.

The engine hands over plain numbers and numpy arrays and gets such back, so that it, the scheduler and the
tests need no torch. `CpuRunner` is in runner_cpu.py; a CUDA runner keeps this contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from enginehouse.types import SamplingParameters

IntArray: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclass(slots=True, eq=False)
class SequenceState:
    """What a runner may know of a sequence whose next token is to be sampled. Owned by the engine.

    `tokens` are prompt and output so far; the runner reads them only where a setting asks for it (penalties,
    bad words).
    """

    sampling: SamplingParameters
    seed: int
    tokens: Sequence[int]
    num_prompt_tokens: int
    bad_word_ids: Sequence[Sequence[int]] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """With eos; forbidden while fewer than min_tokens are out."""

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


@dataclass(slots=True, eq=False)
class StepInput:
    """One step of one model. T new tokens of S sequences; row i of the sequence arrays is sequence i."""

    tokens: IntArray
    """[T]"""
    positions: IntArray
    """[T]"""
    query_starts: IntArray
    """[S + 1]"""
    context_lengths: IntArray
    """[S] keys after this step."""
    block_places: IntArray
    """[S, max_blocks]; see attention.PLACE_BYTES."""
    wanted_rows: IntArray
    """[R] rows of T whose logits are wanted, ascending."""
    sampled: Sequence[SequenceState]
    """The sequences that sample, in order; sample i uses the logits of wanted row `sampled_rows[i]`."""
    sampled_rows: IntArray
    """[len(sampled)] into wanted rows."""
    prompt_logprob_rows: Sequence[tuple[int, int, int]] = field(default_factory=tuple)
    """(wanted row, the token that really followed, number of alternatives)"""


@dataclass(slots=True)
class RowLogprobs:
    """Log-probabilities at one row: the token that was chosen or followed, then the likeliest."""

    token_id: int
    logprob: float
    rank: int
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]


@dataclass(slots=True)
class StepOutput:
    """`token_ids[i]` was sampled for `sampled[i]`; its logprobs if it asked for them."""

    token_ids: Sequence[int]
    logprobs: Sequence[RowLogprobs | None]
    prompt_logprobs: Sequence[RowLogprobs]
    nan_rows: Sequence[int] = ()
    """Samples whose logits were not numbers: the engine fails those sequences and no others."""


class Runner(ABC):
    """One model on one device group, with its weights."""

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Of one KV block in this runner's layout."""

    @abstractmethod
    def attach_arena(self, arena: object) -> None:
        """The arena (arena.Arena) whose memory the block places of all steps point into."""

    @abstractmethod
    def run(self, step: StepInput) -> StepOutput:
        """Computes and samples. Blocks until the tokens are known."""

    @abstractmethod
    def copy_blocks(self, source_places: IntArray, target_places: IntArray) -> None:
        """Moves whole blocks inside the arena (when a page is emptied)."""

    @abstractmethod
    def close(self) -> None:
        """Gives weights and buffers back."""
