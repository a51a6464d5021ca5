"""How long a step will take, learnt from the steps that ran; from it, how many prompt tokens one may take.

Pure. A step costs a base that depends on the number of decoding rows, and so much for each prompt token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_MEMORY = 0.2
"""Weight of the newest observation."""
_ENOUGH_TOKENS = 16
"""Steps with fewer prompt tokens say little about the cost of one."""
_MANY_TOKENS = 256
"""So many hide what a step costs anyway."""


@dataclass(slots=True)
class LatencyModel:
    """Seconds. Before anything was observed, predictions are zero and chunks are as large as allowed."""

    token_s: float = 0.0
    many_token_s: float = 0.0
    """Of a prompt token in a step of many and no decoding rows; 0 before there was one."""
    _base_s: dict[int, float] = field(default_factory=dict)
    """By bit length of the number of rows: 1, 2–3, 4–7, …"""

    def observe(self, num_rows: int, num_prompt_tokens: int, seconds: float) -> None:
        if num_prompt_tokens == 0:
            bucket = num_rows.bit_length()
            self._base_s[bucket] = _smoothed(self._base_s.get(bucket, 0.0), seconds)
        elif num_prompt_tokens >= _ENOUGH_TOKENS:
            measured = max(seconds - self.base_s(num_rows), 0.0) / num_prompt_tokens
            self.token_s = _smoothed(self.token_s, measured)
            if num_rows == 0 and num_prompt_tokens >= _MANY_TOKENS:
                self.many_token_s = _smoothed(self.many_token_s, measured)

    def base_s(self, num_rows: int) -> float:
        """Of a step of so many decoding rows alone: the nearest that was seen. 0 for no rows."""
        if num_rows == 0 or not self._base_s:
            return 0.0
        wanted = num_rows.bit_length()
        return self._base_s[min(self._base_s, key=lambda bucket: (abs(bucket - wanted), bucket))]

    def predict_s(self, num_rows: int, num_prompt_tokens: int) -> float:
        return self.base_s(num_rows) + self.token_s * num_prompt_tokens

    def chunk(self, num_rows: int, target_s: float) -> float:
        """Prompt tokens that fit beside so many decoding rows into a step of `target_s`; may be infinite."""
        if not self.token_s:
            return float("inf")
        return max(target_s - self.base_s(num_rows), 0.0) / self.token_s

    def chunk_alone(self, target_s: float) -> float:
        """Prompt tokens that fit into a step of their own; 0 if that is not known yet."""
        return target_s / self.many_token_s if self.many_token_s else 0.0


def _smoothed(known: float, measured: float) -> float:
    return known + _MEMORY * (measured - known) if known else measured
