"""From a request's fields to sampling parameters; refuses what is out of range or contradicts itself. Pure.

What only the engine can know, such as the length of the context, it says itself.
"""

from __future__ import annotations

from typing import TypeVar

from enginehouse.errors import Unsupported
from enginehouse.frontends.openai.errors import BadField
from enginehouse.frontends.openai.requests import ChatRequest, Common, CompletionRequest
from enginehouse.types import SamplingParameters

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 64
_MAX_TOKEN_ID = 2**31 - 1

N = TypeVar("N", int, float)


def completion_sampling(request: CompletionRequest, default_max_tokens: int) -> SamplingParameters:
    max_tokens = default_max_tokens if request.max_tokens is None else request.max_tokens
    if request.echo and request.max_tokens == 0:
        max_tokens = 1  # the prompt alone is wanted; what comes after it is thrown away
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise BadField("best_of", "only the value of n is supported")
    if request.suffix:
        raise BadField("suffix", "is not supported")
    logprobs = _in_range("logprobs", request.logprobs, 0, MAX_LOGPROBS)
    prompt_logprobs = request.prompt_logprobs
    if request.echo and logprobs is not None and prompt_logprobs is None:
        prompt_logprobs = logprobs
    return _sampling(request, max_tokens, logprobs, prompt_logprobs)


def chat_sampling(request: ChatRequest) -> SamplingParameters:
    """Without a limit a chat answer may fill the context, as its clients expect."""
    max_tokens = request.max_completion_tokens
    if max_tokens is None:
        max_tokens = request.max_tokens
    top_logprobs = _in_range("top_logprobs", request.top_logprobs, 0, MAX_LOGPROBS)
    if top_logprobs is not None and not request.logprobs:
        raise BadField("top_logprobs", "needs logprobs: true")
    logprobs = (top_logprobs or 0) if request.logprobs else None
    if request.tool_choice not in (None, "none", "auto"):
        raise BadField("tool_choice", "only 'none' and 'auto' are supported")
    return _sampling(request, max_tokens, logprobs, request.prompt_logprobs)


def _sampling(
    request: Common, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParameters:
    _refuse_unsupported(request)
    _in_range("max_tokens", max_tokens, 1, None)
    min_tokens = _in_range("min_tokens", request.min_tokens, 0, None) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise BadField("min_tokens", f"{min_tokens} is more than max_tokens, {max_tokens}")
    top_k = request.top_k or 0
    if top_k < -1:
        raise BadField("top_k", f"{top_k} is neither -1 nor at least 0")
    return SamplingParameters(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_value(_in_range("temperature", request.temperature, 0.0, None), 1.0),
        top_p=_value(_above_zero("top_p", request.top_p, 1.0), 1.0),
        top_k=max(top_k, 0),
        min_p=_value(_in_range("min_p", request.min_p, 0.0, 1.0), 0.0),
        presence_penalty=_value(_in_range("presence_penalty", request.presence_penalty, -2.0, 2.0), 0.0),
        frequency_penalty=_value(_in_range("frequency_penalty", request.frequency_penalty, -2.0, 2.0), 0.0),
        repetition_penalty=_value(_above_zero("repetition_penalty", request.repetition_penalty, None), 1.0),
        logit_bias=_logit_bias(request.logit_bias),
        allowed_token_ids=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
        bad_words=tuple(request.bad_words or ()),
        seed=_in_range("seed", request.seed, -(2**63), 2**64 - 1),
        stop=_stops(request.stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=_in_range("prompt_logprobs", prompt_logprobs, 0, MAX_LOGPROBS),
        skip_special_tokens=request.skip_special_tokens is not False,
    )


def _refuse_unsupported(request: Common) -> None:
    if request.response_format is not None and request.response_format.type != "text":
        raise Unsupported(f"response_format: type '{request.response_format.type}' is not supported")
    for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        if getattr(request, name) is not None:
            raise Unsupported(f"{name}: constrained output is not supported")
    if request.use_beam_search:
        raise Unsupported("use_beam_search: beam search is not supported")


def num_choices(request: Common) -> int:
    return _value(_in_range("n", request.n, 1, MAX_CHOICES), 1)


def _value(given: N | None, default: N) -> N:
    return default if given is None else given


def _in_range(name: str, given: N | None, low: N | None, high: N | None) -> N | None:
    # "not (a <= b)" so that NaN is out of every range.
    if given is not None and not ((low is None or low <= given) and (high is None or given <= high)):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise BadField(name, f"{given} is not {bounds}")
    return given


def _above_zero(name: str, given: float | None, high: float | None) -> float | None:
    if given is not None and not (given > 0 and (high is None or given <= high)):
        limit = "" if high is None else f" and at most {high}"
        raise BadField(name, f"{given} is not above 0{limit}")
    return given


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if "" in stops:
        raise BadField("stop", "an empty string can't stop anything")
    if len(stops) > MAX_STOPS:
        raise BadField("stop", f"{len(stops)} strings are more than {MAX_STOPS}")
    return stops


def _logit_bias(given: dict[str, float] | None) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in (given or {}).items():
        if not (key.isascii() and key.isdigit() and int(key) <= _MAX_TOKEN_ID):
            raise BadField("logit_bias", f"'{key}' is no token id")
        biases[int(key)] = _value(_in_range("logit_bias", bias, -100.0, 100.0), 0.0)
    return biases
