"""Sampling fields that can't be right are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from enginehouse.errors import InvalidArgument
from enginehouse.types import SamplingParameters
from enginehouse_backends.llm.sampling_checks import check_sampling


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"temperature": -0.1}, "'temperature' must be at least 0, found -0.1"),
        ({"temperature": float("nan")}, "'temperature' must be at least 0, found nan"),
        ({"temperature": float("inf")}, "'temperature' must be at least 0, found inf"),
        ({"top_p": 0.0}, "'top_p' must be above 0 and at most 1, found 0"),
        ({"top_p": 1.1}, "'top_p'"),
        ({"top_k": -2}, "'top_k'"),
        ({"min_p": 1.5}, "'min_p'"),
        ({"presence_penalty": 2.5}, "'presence_penalty' must be at least -2 and at most 2"),
        ({"frequency_penalty": -2.5}, "'frequency_penalty'"),
        ({"repetition_penalty": 0.0}, "'repetition_penalty' must be above 0"),
        ({"max_tokens": 0}, "'max_tokens' must be at least 1, found 0"),
        ({"min_tokens": 5, "max_tokens": 4}, "'min_tokens' 5 is more than 'max_tokens' 4"),
        ({"logprobs": 21}, "'logprobs' must be between 0 and 20, found 21"),
        ({"prompt_logprobs": -1}, "'prompt_logprobs'"),
        ({"stop": ["a", ""]}, "'stop' holds an empty string"),
        ({"stop": ["a"], "detokenize": False}, "'stop' needs text"),
        ({"stop_token_ids": [100]}, "'stop_token_ids' has token id 100, the vocabulary has ids 0 to 99"),
        ({"logit_bias": {-1: 1.0}}, "'logit_bias' has token id -1"),
        ({"logit_bias": {1: 101.0}}, "'logit_bias of token 1' must be at least -100 and at most 100"),
        ({"allowed_token_ids": []}, "'allowed_token_ids' is empty"),
        ({"allowed_token_ids": [7, 100]}, "'allowed_token_ids' has token id 100"),
        ({"bad_words": [""]}, "'bad_words' holds an empty string"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_sampling(SamplingParameters(**fields), vocab_size=100)
    assert text in str(caught.value)


def test_right_fields_pass() -> None:
    check_sampling(SamplingParameters(), 100)
    check_sampling(SamplingParameters(temperature=0, top_p=1, top_k=-1, min_p=1, logprobs=0, stop=["a"]), 100)
