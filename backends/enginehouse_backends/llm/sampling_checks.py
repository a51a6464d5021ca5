"""Whether a request's sampling fields can be right, each by itself and together. Pure.

Every refusal names the field, what it holds and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from enginehouse.errors import InvalidArgument
from enginehouse.types import SamplingParameters

MAX_LOGPROBS = 20
MAX_STOPS = 64


def check_sampling(sampling: SamplingParameters, vocab_size: int) -> None:
    """Raises InvalidArgument."""
    _within("temperature", sampling.temperature, 0, math.inf)
    _within("top_p", sampling.top_p, 0, 1, above=True)
    _within("min_p", sampling.min_p, 0, 1)
    _within("presence_penalty", sampling.presence_penalty, -2, 2)
    _within("frequency_penalty", sampling.frequency_penalty, -2, 2)
    _within("repetition_penalty", sampling.repetition_penalty, 0, math.inf, above=True)
    if sampling.top_k < -1:
        raise InvalidArgument(f"'top_k' must be at least 1, or 0 or -1 for all tokens, found {sampling.top_k}")
    _check_lengths(sampling)
    _check_logprobs("logprobs", sampling.logprobs)
    _check_logprobs("prompt_logprobs", sampling.prompt_logprobs)
    _check_stops(sampling)
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_ids("logit_bias", sampling.logit_bias, vocab_size)
    for token_id, bias in sampling.logit_bias.items():
        _within(f"logit_bias of token {token_id}", bias, -100, 100)
    if sampling.allowed_token_ids is not None:
        if not sampling.allowed_token_ids:
            raise InvalidArgument("'allowed_token_ids' is empty: no token could be chosen")
        _check_ids("allowed_token_ids", sampling.allowed_token_ids, vocab_size)
    if any(not word for word in sampling.bad_words):
        raise InvalidArgument("'bad_words' holds an empty string")


def _within(name: str, value: float, least: float, most: float, above: bool = False) -> None:
    right = (value > least if above else value >= least) and value <= most and math.isfinite(value)
    if right:
        return
    bounds = f"above {least:g}" if above else f"at least {least:g}"
    if math.isfinite(most):
        bounds += f" and at most {most:g}"
    raise InvalidArgument(f"'{name}' must be {bounds}, found {value}")


def _check_lengths(sampling: SamplingParameters) -> None:
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise InvalidArgument(f"'max_tokens' must be at least 1, found {sampling.max_tokens}")
    if sampling.min_tokens < 0:
        raise InvalidArgument(f"'min_tokens' must be at least 0, found {sampling.min_tokens}")
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidArgument(f"'min_tokens' {sampling.min_tokens} is more than 'max_tokens' {sampling.max_tokens}")


def _check_logprobs(name: str, count: int | None) -> None:
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise InvalidArgument(f"'{name}' must be between 0 and {MAX_LOGPROBS}, found {count}")


def _check_stops(sampling: SamplingParameters) -> None:
    if any(not stop for stop in sampling.stop):
        raise InvalidArgument("'stop' holds an empty string")
    if len(sampling.stop) > MAX_STOPS:
        raise InvalidArgument(f"'stop' holds {len(sampling.stop)} strings, at most {MAX_STOPS} are allowed")
    if sampling.stop and not sampling.detokenize:
        raise InvalidArgument("'stop' needs text: it can't be used with 'detokenize' false")


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidArgument(f"'{name}' has token id {token_id}, the vocabulary has ids 0 to {vocab_size - 1}")
