"""Whole answers, and the parts of streamed ones that are made once. Pure.

A shape is what differs between the two endpoints; `Answer` is what one request's answers have in common.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from enginehouse.frontends.openai.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from enginehouse.types import FinishReason, TokenEvent


@dataclass(slots=True)
class Answer:
    """`prompts`: by choice, which prompt it continues; choices of one prompt stand together."""

    id: str
    model: str
    is_chat: bool
    prompts: Sequence[int]
    num_top_logprobs: int | None = None
    """None reports none."""
    echo: bool = False
    echo_only: bool = False
    return_token_ids: bool = False
    return_prompt_text: bool = False
    tokens_as_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, *, streamed: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.is_chat else "text_completion"
        if streamed and self.is_chat:
            kind += ".chunk"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def logprobs(self, event: TokenEvent, offset: int) -> dict[str, Any] | None:
        if self.num_top_logprobs is None:
            return None
        if self.is_chat:
            return chat_logprobs(event.logprobs, self.num_top_logprobs, self.tokens_as_ids)
        return completion_logprobs(event.logprobs, offset, self.num_top_logprobs, self.tokens_as_ids)


def finish_text(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value


def whole_answer(answer: Answer, events: Sequence[TokenEvent]) -> dict[str, Any]:
    """From the last event of each choice."""
    document = answer.head(streamed=False)
    document["choices"] = [_choice(answer, index, event) for index, event in enumerate(events)]
    document["usage"] = usage(answer, dict(enumerate(events)))
    if answer.is_chat:
        document["prompt_logprobs"] = prompt_logprobs(events[0].prompt_logprobs)
        if answer.return_token_ids:
            document["prompt_token_ids"] = list(events[0].prompt_token_ids or ())
        if answer.return_prompt_text:
            document["prompt_text"] = events[0].prompt_text
    return document


def _choice(answer: Answer, index: int, event: TokenEvent) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index}
    prompt = (event.prompt_text or "") if answer.echo else ""
    if answer.is_chat:
        choice["message"] = {"role": "assistant", "content": event.text}
        choice["logprobs"] = answer.logprobs(event, 0)
    else:
        choice["text"] = prompt if answer.echo_only else prompt + event.text
        choice["logprobs"] = _with_prompt(answer, event, len(prompt)) if answer.echo else answer.logprobs(event, 0)
        choice["prompt_logprobs"] = prompt_logprobs(event.prompt_logprobs)
    choice["finish_reason"] = "length" if answer.echo_only else finish_text(event.finish_reason)
    choice["stop_reason"] = event.stop_reason
    if answer.return_token_ids:
        choice["token_ids"] = list(event.token_ids)
        if not answer.is_chat:
            choice["prompt_token_ids"] = list(event.prompt_token_ids or ())
    if answer.return_prompt_text and not answer.is_chat:
        choice["prompt_text"] = event.prompt_text
    return choice


def _with_prompt(answer: Answer, event: TokenEvent, offset: int) -> dict[str, Any] | None:
    """The prompt's log probabilities before the answer's, as echo has them; the first token has none."""
    if answer.num_top_logprobs is None:
        return None
    known = [tokens for tokens in event.prompt_logprobs or () if tokens is not None]
    rest = [] if answer.echo_only else list(event.logprobs)
    first = offset - sum(len(tokens[0].token) for tokens in known)
    merged = completion_logprobs([*known, *rest], max(first, 0), answer.num_top_logprobs, answer.tokens_as_ids)
    if event.prompt_token_ids and len(known) < len(event.prompt_token_ids):
        first_text = (event.prompt_text or "")[: max(first, 0)]
        first_entry = {"tokens": first_text, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
        for key, value in first_entry.items():
            merged[key].insert(0, value)
    return merged


def usage(answer: Answer, last: Mapping[int, TokenEvent]) -> dict[str, Any]:
    """Prompts count once, however many choices continue them."""
    prompts: dict[int, TokenEvent] = {}
    for choice, event in last.items():
        prompts.setdefault(answer.prompts[choice], event)
    num_prompt = sum(event.num_prompt_tokens for event in prompts.values())
    num_generated = 0 if answer.echo_only else sum(event.num_generated_tokens for event in last.values())
    return {
        "prompt_tokens": num_prompt,
        "total_tokens": num_prompt + num_generated,
        "completion_tokens": num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(event.num_cached_tokens for event in prompts.values())},
    }
