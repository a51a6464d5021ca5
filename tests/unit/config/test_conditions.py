"""Conditions of ensemble steps."""

from __future__ import annotations

import numpy as np
import pytest

from enginehouse.config.conditions import Condition
from enginehouse.errors import InvalidArgument
from enginehouse.types import DataType, ParameterValue, Tensor

TENSORS = {
    "score": Tensor.from_numpy("score", np.array([[0.7]], np.float32)),
    "many": Tensor.from_numpy("many", np.array([1, 5, 9], np.int64)),
    "label": Tensor.from_numpy("label", np.array([["cat"]], object)),
    "odd-name": Tensor.from_numpy("odd-name", np.array([3], np.int32)),
    "half": Tensor.from_numpy("half", np.array([0x3F00], np.uint16), DataType.BF16),
    "empty": Tensor.from_numpy("empty", np.zeros((0,), np.float32)),
    "gone": None,
}
PARAMETERS: dict[str, ParameterValue] = {"mode": "full", "limit": 4, "fast": True}


@pytest.mark.parametrize(
    "text",
    [
        "score > 0.5",
        "0.5 < score <= 0.7 + 0.01",
        "not score > 0.9",
        "any(many > 8) and not all(many > 8)",
        "max(many) == 9 and min(many) == 1 and sum(many) == 15 and len(many) == 3 and mean(many) == 5",
        "many[1] == parameters.limit + 1",
        "label == 'cat'",
        "label in ['cat', 'dog'] and label not in ('bird',)",
        "tensor('odd-name') % 2 == 1",
        "half == 0.5",
        "parameters.mode == 'full' and parameters['fast']",
        "parameters.unknown == None",
        "has(score) and not has(gone) and not has('never')",
        "'mode' in parameters",
        "abs(-score) > 0",
    ],
)
def test_what_holds(text: str) -> None:
    assert Condition(text).holds(TENSORS, PARAMETERS)


@pytest.mark.parametrize("text", ["score < 0.5", "gone > 1", "not gone > 1", "empty > 0", "any(empty > 0)", "False"])
def test_what_does_not(text: str) -> None:
    assert not Condition(text).holds(TENSORS, PARAMETERS)


def test_the_tensors_that_a_condition_reads_are_known() -> None:
    condition = Condition("a > 1 and any(b[0] < c) or has('d') or tensor('e-f') == parameters.g")
    assert condition.tensor_names == {"a", "b", "c", "d", "e-f"}


@pytest.mark.parametrize(
    "text",
    [
        "score >",
        "__import__('os')",
        "score.shape",
        "(lambda: 1)()",
        "open('x')",
        "[x for x in many]",
        "many ** 2",
        "a := 1",
    ],
)
def test_anything_else_is_refused_at_load(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^condition '"):
        Condition(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("many > 2", r"it compares 3 values: use any\(\) or all\(\)"),
        ("label > 2", "not supported"),
        ("many[7] > 1", "7"),
    ],
)
def test_values_that_do_not_fit_are_an_error(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Condition(text).holds(TENSORS, PARAMETERS)
