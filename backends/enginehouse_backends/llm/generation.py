"""One request inside the engine: its tokens, how many of them are computed, and the blocks that it holds.

Pure data; scheduler.py moves it through its states, engine.py gives it tokens and answers for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from enginehouse.types import FinishReason, SamplingParameters
from enginehouse_backends.llm.block_pool import BlockHash


class GenerationState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Generation:
    """See module. Who sets a field stands beside it."""

    id: str
    tokens: array[int]
    """Prompt, then output. Front: the prompt; engine: appends each sampled token."""
    num_prompt: int
    sampling: SamplingParameters
    max_total: int
    """Prompt and output together never exceed it (max_tokens and the context). Set at the border."""
    seed: int = 0
    priority: int = 0
    """Lower runs first."""
    tenant: str = ""
    deadline_ns: int = 0
    root: BlockHash = b""
    """Start of its hash chain. Set at the border."""
    stop_token_ids: frozenset[int] = frozenset()
    """End the output; with eos unless it is ignored."""
    bad_word_ids: Sequence[Sequence[int]] = ()
    arrival: int = 0
    """A running number: the scheduler's."""
    arrived_ns: int = 0

    # the scheduler's
    state: GenerationState = GenerationState.WAITING
    num_computed: int = 0
    """Tokens whose keys and values are in its blocks, or will be when the planned step has run."""
    num_unseen: int = 0
    """Tokens that a running step samples and that aren't known yet (asynchronous scheduling)."""
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    """Of its full blocks, as far as they were needed."""
    num_registered: int = 0
    """Leading blocks whose hashes the pool knows."""
    slot: int = -1
    num_cached: int = -1
    """Prompt tokens found in the prefix cache when it first ran."""
    num_preemptions: int = 0
    stalled_at: int = 0
    """Output tokens that it had when prompts last went before its decoding (see prompt_policy.py)."""
    first_scheduled_ns: int = 0

    changes_logits: bool = field(init=False)
    """Whether its sampling does, before a token is chosen; min_tokens apart, which does at first only."""
    only_likeliest: bool = field(init=False)
    """Nothing but the likeliest token is wanted, at every step."""

    def __post_init__(self) -> None:
        wanted = self.sampling
        self.changes_logits = bool(
            wanted.repetition_penalty != 1
            or wanted.presence_penalty
            or wanted.frequency_penalty
            or wanted.logit_bias
            or self.bad_word_ids
            or wanted.allowed_token_ids is not None
        )
        plain = wanted.temperature == 0 and wanted.logprobs is None and wanted.min_tokens == 0
        self.only_likeliest = plain and not self.changes_logits

    # the engine's
    finish_reason: FinishReason | None = None

    @property
    def num_known(self) -> int:
        return len(self.tokens) + self.num_unseen

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that are known and not computed: 1 while decoding, more in prefill."""
        return len(self.tokens) + self.num_unseen - self.num_computed

    @property
    def awaits_last_token(self) -> bool:
        """A running step samples its last token: there is nothing to compute for it any more."""
        return self.num_unseen > 0 and self.num_known >= self.max_total
