"""What is refused at the border, with Triton's words, and what passes."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf import text_format

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.request_checks import RequestChecks
from enginehouse.types import Array, DataType, InferRequest, Tensor

NOBODY = "[request id: <id_unknown>] "


def checks_of(text: str) -> RequestChecks:
    config = ModelConfig(name="m")
    text_format.Merge(text, config)
    return RequestChecks(config)


def request_with(**arrays: Array) -> InferRequest:
    return InferRequest("m", inputs={name: Tensor.from_numpy(name, array) for name, array in arrays.items()})


PAIR = """max_batch_size: 4
input { name: "A" data_type: TYPE_INT32 dims: [2] }
input { name: "B" data_type: TYPE_INT32 dims: [-1] }
output { name: "OUT" data_type: TYPE_INT32 dims: [2] }"""


def ints(*shape: int) -> Array:
    return np.zeros(shape, np.int32)


def refusal(checks: RequestChecks, request: InferRequest) -> str:
    with pytest.raises(InvalidArgument) as caught:
        checks.check(request)
    return caught.value.message


def test_good_request_gets_its_batch_size() -> None:
    request = request_with(A=ints(3, 2), B=ints(3, 7))
    checks_of(PAIR).check(request)
    assert request.batch_size == 3


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (
            request_with(A=ints(1, 2)),
            "expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['A'], but missing required input(s) "
            "['B']. Please provide all required input(s).",
        ),
        (
            request_with(A=ints(1, 2), B=ints(1, 2), C=ints(1, 2)),
            "expected 2 inputs but got 3 inputs for model 'm'. Got input(s) ['C','B','A'], but missing required "
            "input(s) ]. Please provide all required input(s).",
        ),
        (request_with(A=ints(5, 2), B=ints(5, 2)), "inference request batch-size must be <= 4 for 'm'"),
        (request_with(A=ints(1, 2), B=ints(2, 2)), "input 'A' batch size does not match other inputs for 'm'"),
        (
            request_with(A=np.zeros((1, 2), np.float32), B=ints(1, 2)),
            "inference input 'A' data-type is 'FP32', but model 'm' expects 'INT32'",
        ),
    ],
)
def test_refusals_have_tritons_texts(request_: InferRequest, text: str) -> None:
    assert refusal(checks_of(PAIR), request_) == NOBODY + text


def test_wrong_shape_is_told_with_the_batch_axis() -> None:
    text = refusal(checks_of(PAIR), request_with(A=ints(1, 3), B=ints(1, 2)))
    assert text.startswith(NOBODY + "unexpected shape for input 'A' for model 'm'. Expected [-1,2], got [1,3]. NOTE: ")


def test_a_negative_batch_axis_is_no_dimension_of_the_input() -> None:
    request = request_with(A=ints(1, 2), B=ints(1, 2))
    request.inputs = {name: Tensor(name, DataType.INT32, (-1,), memoryview(b"")) for name in "AB"}
    assert "unexpected shape for input 'B' for model 'm'. Expected [-1,-1], got [-1]." in refusal(
        checks_of(PAIR), request
    )


def test_unknown_names_are_told_without_the_request_id() -> None:
    checks = checks_of(PAIR)
    assert refusal(checks, request_with(A=ints(1, 2), X=ints(1, 2))) == "unexpected inference input 'X' for model 'm'"
    request = request_with(A=ints(1, 2), B=ints(1, 2))
    request.requested_outputs = ["NOPE"]
    assert refusal(checks, request) == "unexpected inference output 'NOPE' for model 'm'"


def test_of_two_wrong_inputs_the_last_is_told_and_of_two_wrong_outputs_the_first_by_name() -> None:
    checks = checks_of(PAIR)
    request = request_with(A=ints(1, 2), B=ints(1, 2))
    request.inputs = {name: Tensor(name, DataType.INVALID, (1, 2), memoryview(b"")) for name in "AB"}
    text = "inference input 'B' data-type is '<invalid>', but model 'm' expects 'INT32'"
    assert refusal(checks, request) == NOBODY + text
    request.requested_outputs = ["Z", "Y"]
    assert refusal(checks, request) == "unexpected inference output 'Y' for model 'm'"


def test_too_few_bytes_are_refused() -> None:
    request = request_with(A=ints(1, 2), B=ints(1, 2))
    request.inputs["A"] = Tensor("A", DataType.INT32, (1, 2), memoryview(b"1234"))
    text = "input byte size mismatch for input 'A' for model 'm'. Expected 8, got 4"
    assert refusal(checks_of(PAIR), request) == NOBODY + text


def test_a_batch_of_none_is_refused_even_with_the_bytes_of_one() -> None:
    request = request_with(A=ints(0, 2), B=ints(0, 2))
    text = "input byte size mismatch for input 'B' for model 'm'. Expected 8, got 0"
    assert refusal(checks_of(PAIR), request) == NOBODY + text
    for name in "AB":
        request.inputs[name] = Tensor(name, DataType.INT32, (0, 2), memoryview(bytes(8)))
    text = "inference request batch-size must be >= 1 for 'm'"
    assert refusal(checks_of(PAIR), request) == NOBODY + text


TEXT = 'input { name: "T" data_type: TYPE_STRING dims: [2] }'
CUT_LENGTH = (
    NOBODY + "incomplete string length indicator for inference input 'T' for model 'm', expecting 4 bytes but only "
    "2 bytes available. Please make sure the string length indicator is in one buffer."
)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\1\0\0\0a", NOBODY + "expected 2 string elements for inference input 'T' for model 'm', got 1"),
        (
            b"\1\0\0\0a" * 3,
            NOBODY + "unexpected number of string elements 3 for inference input 'T' for model 'm', expecting 2",
        ),
        (
            b"\1\0\0\0a\7\0\0\0bc",
            "incomplete string data for inference input 'T', expecting string of length 7 but only 2 bytes available",
        ),
        (b"\1\0\0\0a" * 2 + b"\7\0", CUT_LENGTH),
        (b"\1\0\0\0a\7\0", CUT_LENGTH),
        (b"\7\0\0\0a", NOBODY + "expected 2 string elements for inference input 'T' for model 'm', got 1"),
    ],
)
def test_string_elements_are_counted(data: bytes, text: str) -> None:
    request = InferRequest("m", inputs={"T": Tensor("T", DataType.BYTES, (2,), memoryview(data))})
    assert refusal(checks_of(TEXT), request) == text


def test_optional_inputs_may_be_left_out_but_required_ones_may_not() -> None:
    checks = checks_of(
        """input { name: "A" data_type: TYPE_INT32 dims: [1] }
        input { name: "B" data_type: TYPE_INT32 dims: [1] optional: true }"""
    )
    checks.check(request_with(A=ints(1)))
    assert refusal(checks, request_with(B=ints(1))).startswith(
        NOBODY + "expected number of inputs between 1 and 2 but got 1 inputs"
    )


def test_reshaped_input_reaches_the_model_in_the_models_shape() -> None:
    checks = checks_of(
        """max_batch_size: 2
        input { name: "A" data_type: TYPE_INT32 dims: [-1, 2] reshape { shape: [2, -1, 1] } }"""
    )
    request = request_with(A=ints(1, 5, 2))
    checks.check(request)
    assert request.inputs["A"].shape == (1, 2, 5, 1)
