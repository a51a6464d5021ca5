"""Log probabilities in the shapes of the two endpoints. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from enginehouse.types import TokenLogprob

_LOWEST = -9999.0
"""JSON has no minus infinity."""


def completion_logprobs(
    tokens: Sequence[Sequence[TokenLogprob]], offset: int, num_top: int, as_ids: bool
) -> dict[str, Any]:
    """Four lists side by side. `offset` is where the first token's text begins in the whole text."""
    texts, values, tops, offsets = [], [], [], []
    for alternatives in tokens:
        sampled = alternatives[0]
        text = _name(sampled, as_ids)
        texts.append(text)
        values.append(max(sampled.logprob, _LOWEST))
        offsets.append(offset)
        tops.append({_name(each, as_ids): max(each.logprob, _LOWEST) for each in _top(alternatives, num_top)})
        offset += len(sampled.token)
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(tokens: Sequence[Sequence[TokenLogprob]], num_top: int, as_ids: bool) -> dict[str, Any]:
    content = []
    for alternatives in tokens:
        entry = _chat_entry(alternatives[0], as_ids)
        entry["top_logprobs"] = [_chat_entry(each, as_ids) for each in _top(alternatives, num_top)]
        content.append(entry)
    return {"content": content}


def prompt_logprobs(
    tokens: Sequence[Sequence[TokenLogprob] | None] | None,
) -> list[Mapping[str, Any] | None] | None:
    """vLLM's form: for each token of the prompt its alternatives by id; nothing is known of the first."""
    if tokens is None:
        return None
    return [
        None
        if alternatives is None
        else {
            str(each.token_id): {
                "logprob": max(each.logprob, _LOWEST), "rank": each.rank, "decoded_token": each.token,
            }
            for each in alternatives
        }
        for alternatives in tokens
    ]  # fmt: skip


def _top(alternatives: Sequence[TokenLogprob], num_top: int) -> list[TokenLogprob]:
    """The likeliest ones; the sampled token stands first and may be among them a second time."""
    if num_top == 0:
        return []
    unique = {each.token_id: each for each in alternatives}
    return sorted(unique.values(), key=lambda each: -each.logprob)[:num_top]


def _name(token: TokenLogprob, as_ids: bool) -> str:
    return f"token_id:{token.token_id}" if as_ids else token.token


def _chat_entry(token: TokenLogprob, as_ids: bool) -> dict[str, Any]:
    raw = token.raw or token.token.encode()
    return {"token": _name(token, as_ids), "logprob": max(token.logprob, _LOWEST), "bytes": list(raw)}
