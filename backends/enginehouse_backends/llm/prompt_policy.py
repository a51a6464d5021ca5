"""How many prompt tokens the next step takes, and whether decoding waits for them meanwhile.

Pure. With a latency target, a step that decodes takes no more prompt tokens than fit under it. Without one, a
step may take three times as long as decoding alone; and a burst of prompts is computed at once while decoding
stalls, if nobody has been stalled recently: each then waits once, rather than every token of everybody being
late, and the last prompt's first token comes as soon as it can. A step can't be interrupted: where a longest one
is set, prompts alone take no more than that, or 512 tokens if these take longer or another model waits for its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.latency_model import LatencyModel

_SLOWDOWN = 3.0
"""A step with prompts may take so many times as long as one that only decodes."""
_LEAST_TARGET_S = 0.01
"""Nobody sees steps that are shorter."""
_WORTHWHILE_TOKENS = 512
"""So many hide what it costs to read the weights."""
_STALL_TOKENS = 4096
"""Prompt tokens of one stall at most."""
_TOKENS_BETWEEN_STALLS = 100
"""A generation that has begun is stalled once in so many tokens: under one in a hundred of its gaps is long."""


@dataclass(slots=True)
class PromptPolicy:
    """`target_s` of 0 is none. One per scheduler; it remembers the stall that is going on."""

    max_batched_tokens: int
    min_chunk_tokens: int
    target_s: float
    longest_s: float = 0.0
    """Of a step of prompts alone; 0 is any length."""
    others_wait: bool = False
    """Another model of the engine has work, too."""
    _stalled_tokens: int = 0

    def may_stall(self, decoding: Sequence[Generation], backlog_tokens: int, latency: LatencyModel) -> bool:
        """Whether the next step should leave decoding out. `backlog_tokens`: prompts that wait or are under way."""
        if not decoding or self._stalled_tokens >= _STALL_TOKENS:
            return False
        return not self._is_soon_done(decoding, backlog_tokens, latency) and self._can_bear_a_wait(decoding)

    def _is_soon_done(self, decoding: Sequence[Generation], backlog_tokens: int, latency: LatencyModel) -> bool:
        """Beside the decoding."""
        return backlog_tokens <= 2 * self._beside(len(decoding), latency)

    def _can_bear_a_wait(self, decoding: Sequence[Generation]) -> bool:
        return not self.target_s and all(
            generation.num_output <= 1
            or generation.num_output == generation.stalled_at
            or generation.num_output - generation.stalled_at >= _TOKENS_BETWEEN_STALLS
            for generation in decoding
        )

    def on_stall(self, decoding: Sequence[Generation], num_tokens: int) -> None:
        """A step of `num_tokens` prompt tokens left these out."""
        self._stalled_tokens += num_tokens
        for generation in decoding:
            generation.stalled_at = generation.num_output

    def budget_beside(self, decoding: Sequence[Generation], backlog_tokens: int, latency: LatencyModel) -> int:
        """Prompt tokens for a step in which these decode: all that there are rather than a second long step, if nobody
        has waited recently. Then that was the wait."""
        usual = self.budget(len(decoding), latency)
        if backlog_tokens <= usual or not decoding or not self._is_soon_done(decoding, backlog_tokens, latency):
            return usual
        if not self._can_bear_a_wait(decoding):
            return usual
        for generation in decoding:
            generation.stalled_at = generation.num_output
        return min(self.max_batched_tokens - len(decoding), backlog_tokens)

    def on_decode(self) -> None:
        """A step decoded: the stall, if there was one, is over."""
        self._stalled_tokens = 0

    def budget(self, num_decoding: int, latency: LatencyModel) -> int:
        """Prompt tokens for a step in which so many decode."""
        if num_decoding == 0:
            return self.budget_alone(latency)
        room = self.max_batched_tokens - num_decoding
        return int(max(min(room, self._beside(num_decoding, latency)), self.min_chunk_tokens))

    def budget_alone(self, latency: LatencyModel) -> int:
        """Prompt tokens for a step that leaves decoding out."""
        if not self.longest_s:
            return self.max_batched_tokens
        fitting = 0.0 if self.others_wait else latency.chunk_alone(self.longest_s)
        return int(min(self.max_batched_tokens, max(_WORTHWHILE_TOKENS, fitting)))

    def _beside(self, num_decoding: int, latency: LatencyModel) -> float:
        target = self.target_s or max(_SLOWDOWN * latency.base_s(num_decoding), _LEAST_TARGET_S)
        return latency.chunk(num_decoding, target)
