"""What runs a planned step: the only place where an engine's plan becomes tensors.

The engine hands over plain numbers and numpy arrays and gets such back, so that it, the scheduler and the
tests need no torch. `CpuRunner` is in runner_cpu.py; a CUDA runner keeps this contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from enginehouse_backends.llm.generation import Generation

if TYPE_CHECKING:
    from enginehouse_backends.llm.arena import Arena

IntArray: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]


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
    slots: IntArray
    """[S] each sequence's row of the block table."""
    block_table: IntArray
    """[slots, most blocks of a sequence] places (see attention.PLACE_BYTES). Persistent: the engine changes
    rows between steps, so a copy on a device may be kept up to date by `changed_slots`."""
    changed_slots: Sequence[int]
    """Rows of the block table that are not as they were in the model's last step."""
    wanted_rows: IntArray
    """[R] rows of T whose logits are wanted, ascending."""
    sampled: Sequence[Generation]
    """Those that sample, in order. Read their sampling, seed and tokens; never write."""
    sampled_rows: IntArray
    """[len(sampled)] into wanted rows."""
    followed: Sequence[FollowedToken] = field(default_factory=tuple)
    """Prompt tokens whose logprobs are wanted."""
    unseen: Sequence[tuple[int, int]] = field(default_factory=tuple)
    """(row of T, index into the previous step's `sampled`): tokens that only the device knows yet. Given by an
    engine that starts a step before it has finished the one before; `tokens` holds anything there."""


@dataclass(frozen=True, slots=True)
class FollowedToken:
    """`token_id` came after the position of wanted row `row`; how likely was it, beside `num_top` others?"""

    row: int
    token_id: int
    num_top: int


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Natural log-probabilities of unchanged logits: of the token that came, then of the likeliest."""

    token_id: int
    logprob: float
    rank: int
    """1 is the likeliest."""
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]


@dataclass(slots=True)
class StepOutput:
    """`token_ids[i]` was sampled for `sampled[i]`, -1 where its logits were not numbers."""

    token_ids: Sequence[int]
    logprobs: Sequence[RowLogprobs | None]
    """As long as token_ids, or empty if nobody asked."""
    followed: Sequence[RowLogprobs] = ()
    vectors: FloatArray | None = None
    """[S, width] of a model that embeds: each sequence's last row, or the sum of this step's."""


class RunningStep(ABC):
    """A step that was started. Finish them in the order in which they were started, each once."""

    may_overlap = False
    """Whether the next step may be started before this one is finished: all its tokens are chosen on the device."""

    @abstractmethod
    def finish(self) -> StepOutput:
        """Blocks until the tokens are known."""


class FinishedStep(RunningStep):
    """Of a runner that does a step in one go."""

    def __init__(self, output: StepOutput) -> None:
        self._output = output

    def finish(self) -> StepOutput:
        return self._output


class Runner(ABC):
    """One model on one device group, with its weights."""

    is_asynchronous = False
    """Whether `start` returns before the step is done, so that the next one can be planned meanwhile."""

    is_native = False
    """Whether a step is one call into the CPU kernels."""
    pooling = ""
    """Of a model that embeds: "last" or "mean" (pooling.py)."""
    max_wanted: int
    """Most rows whose logits a step may want."""
    block_size: int
    """Tokens in a KV block."""
    weight_bytes: int
    workspace_bytes: int

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Of one KV block in this runner's layout; a multiple of attention.PLACE_BYTES."""

    @abstractmethod
    def attach_arena(self, arena: Arena) -> None:
        """The memory that the block places of all steps point into."""

    def detach_arena(self) -> None:
        """Lets go of that memory: no step follows until another arena is attached."""
        return

    @abstractmethod
    def run(self, step: StepInput) -> StepOutput:
        """Computes and samples. Blocks until the tokens are known."""

    def start(self, step: StepInput) -> RunningStep:
        """As `run`, in two parts. At most two steps may be unfinished."""
        return FinishedStep(self.run(step))

    @abstractmethod
    def copy_blocks(self, source_places: IntArray, target_places: IntArray) -> None:
        """Copies whole blocks inside the arena, in order (when a page is emptied)."""

    @abstractmethod
    def close(self) -> None:
        """Gives weights and buffers back."""
