"""How what goes wrong in model.py reads to clients: only the model's own frames, as with Triton's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from enginehouse_backends.python_model.errors import TritonError, describe
from enginehouse_backends.python_model.response import InferenceResponse
from enginehouse_backends.python_model.tensor import Tensor


def described(action: Callable[[], Any]) -> tuple[str, list[str]]:
    """The text and the names of the frames, innermost first."""
    try:
        action()
    except Exception as problem:
        text, _, places = describe(problem).partition("\n\nAt:\n")
        return text, [line.rpartition(": ")[2] for line in places.splitlines()]
    pytest.fail("nothing was raised")


def complex_tensor() -> None:
    Tensor("OUT", np.array([1j]))


def wrong_code() -> None:
    TritonError("m", 99)


def no_error() -> None:
    InferenceResponse([], error="text")  # type: ignore[arg-type]


def list_parameter() -> None:
    InferenceResponse([], parameters={"a": [1]})  # type: ignore[dict-item]


def nothing_to_say() -> None:
    raise ValueError


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (complex_tensor, "TritonModelException: NumPy dtype is not supported."),
        (wrong_code, "TypeError: TritonError(message: str, code: int): 99 is none of its codes"),
        (no_error, "TypeError: InferenceResponse(error: TritonError): found type '<class 'str'>'"),
        (
            list_parameter,
            "TritonModelException: Expect parameters values to have type bool/int/str, found type <class 'list'>",
        ),
        (nothing_to_say, "ValueError: <EMPTY MESSAGE>"),
    ],
)
def test_the_first_frame_is_the_models(action: Callable[[], None], text: str) -> None:
    found, frames = described(action)
    assert (found, frames[0]) == (text, action.__name__)
