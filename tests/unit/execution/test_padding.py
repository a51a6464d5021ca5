"""Padding in, un-padding out: a padded batch gives each request what it would get alone."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.execution.joiners import joiner_of
from enginehouse.execution.padding import PaddingPlan
from enginehouse.types import Array, InferRequest, Tensor


def config_of(text: str) -> ModelConfig:
    config = ModelConfig()
    text_format.Parse(text, config)
    return config


def padded_config(
    padding: str = "", unpadding: str = "", dims: str = "-1", datatype: str = "TYPE_INT64"
) -> ModelConfig:
    return config_of(
        f"""name: "m" max_batch_size: 8
        input {{ name: "X" data_type: {datatype} dims: [{dims}] }}
        input {{ name: "M" data_type: TYPE_BOOL dims: [-1] optional: true }}
        input {{ name: "L" data_type: TYPE_INT32 dims: [1] optional: true }}
        output {{ name: "Y" data_type: {datatype} dims: [{dims}] }}
        serving {{ padding {{ input: "X" {padding} }} {unpadding} }}"""
    )


ENCODER = """name: "m" max_batch_size: 8
    input { name: "input_ids" data_type: TYPE_INT64 dims: [-1] }
    input { name: "attention_mask" data_type: TYPE_INT64 dims: [-1] }
    output { name: "last_hidden_state" data_type: TYPE_FP32 dims: [-1, 4] }
    output { name: "pooled" data_type: TYPE_FP32 dims: [4] }"""


def requests_of(*arrays: Array, name: str = "X") -> list[InferRequest]:
    return [
        InferRequest("m", inputs={name: Tensor.from_numpy(name, array)}, batch_size=array.shape[0]) for array in arrays
    ]


def rows_of(*lengths: int) -> list[Array]:
    return [np.full((1, length), length, np.int64) for length in lengths]


def joined(config: ModelConfig, arrays: list[Array]) -> dict[str, Array]:
    tensors = joiner_of(config).join(requests_of(*arrays))
    return {tensor.name: tensor.gather().numpy() for tensor in tensors}


def test_short_requests_are_padded_to_the_longest() -> None:
    assert joined(padded_config("value: 9"), rows_of(1, 3))["X"].tolist() == [[1, 9, 9], [3, 3, 3]]


def test_equal_lengths_need_no_padding() -> None:
    [tensor] = joiner_of(padded_config()).join(requests_of(*rows_of(3, 3)))
    assert len(tensor.parts) == 2


@pytest.mark.parametrize(
    ("padding", "lengths", "target"),
    [
        ("buckets: [8, 4]", (1, 3), 4),
        ("buckets: [8, 4]", (5, 3), 8),
        ("buckets: [8, 4]", (5, 11), 11),
        ("multiple_of: 16", (5, 17), 32),
    ],
)
def test_lengths_are_rounded_up(padding: str, lengths: tuple[int, ...], target: int) -> None:
    assert joined(padded_config(padding), rows_of(*lengths))["X"].shape == (2, target)


def test_masks_and_lengths_are_made_where_they_are_asked_for() -> None:
    tensors = joined(padded_config('mask_input: "M" length_input: "L"'), rows_of(1, 3))
    assert tensors["M"].tolist() == [[True, False, False], [True, True, True]]
    assert tensors["L"].tolist() == [[1], [3]]


def test_padding_can_stand_on_the_left() -> None:
    tensors = joined(padded_config('pad_left: true mask_input: "M"'), rows_of(1, 3))
    assert tensors["X"].tolist() == [[0, 0, 1], [3, 3, 3]]
    assert tensors["M"].tolist() == [[False, False, True], [True, True, True]]


def test_a_mask_that_clients_send_is_padded_and_not_made() -> None:
    requests = requests_of(*rows_of(1, 2))
    for request in requests:
        length = request.inputs["X"].shape[1]
        request.inputs["M"] = Tensor.from_numpy("M", np.ones((1, length), np.bool_))
    tensors = {tensor.name: tensor.gather() for tensor in joiner_of(padded_config('mask_input: "M"')).join(requests)}
    assert tensors["M"].numpy().tolist() == [[True, False], [True, True]]


def test_texts_are_padded_with_a_text() -> None:
    arrays: list[Array] = [np.array([["a"]], object), np.array([["b", "cc"]], object)]
    config = padded_config('text_value: "-"', datatype="TYPE_STRING")
    assert joined(config, arrays)["X"].tolist() == [[b"a", b"-"], [b"b", b"cc"]]


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    rows=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    axis=st.integers(0, 1),
    inner=st.integers(1, 3),
    pad_left=st.booleans(),
    code=st.sampled_from(["<f4", "<i8", "O"]),
)
def test_what_is_padded_and_cut_back_is_what_it_was(
    lengths: list[int], rows: list[int], axis: int, inner: int, pad_left: bool, code: str
) -> None:
    dims = "-1, 2" if axis == 0 else f"{inner}, -1"
    datatype = {"<f4": "TYPE_FP32", "<i8": "TYPE_INT64", "O": "TYPE_STRING"}[code]
    config = padded_config(
        f"axis: {axis} pad_left: {str(pad_left).lower()}", f'unpadding {{ output: "Y" axis: {axis} }}', dims, datatype
    )
    arrays: list[Array] = []
    for number, (length, count) in enumerate(zip(lengths, rows, strict=False)):
        shape = (count, length, 2) if axis == 0 else (count, inner, length)
        numbers = np.arange(np.prod(shape)).reshape(shape) + 100 * number
        arrays.append(numbers.astype(str).astype(object) if code == "O" else numbers.astype(code))
    requests = requests_of(*arrays)
    joiner = joiner_of(config)
    [tensor] = joiner.join(requests)
    model_output = Tensor("Y", tensor.datatype, tensor.shape, tensor.gather().data)
    for array, (piece,) in zip(arrays, joiner.split(requests, {"Y": model_output}), strict=True):
        expected = Tensor.from_numpy("Y", array).numpy()
        assert piece.shape == array.shape
        assert piece.numpy().tolist() == expected.tolist()


def test_an_output_without_the_padded_length_is_left_alone() -> None:
    config = padded_config("", 'unpadding { output: "Y" axis: 0 }')
    outputs = {"Y": Tensor.from_numpy("Y", np.zeros((2, 7), np.int64))}
    pieces = joiner_of(config).split(requests_of(*rows_of(1, 3)), outputs)
    assert [piece.shape for (piece,) in pieces] == [(1, 7), (1, 7)]


@pytest.mark.parametrize(
    ("padding", "unpadding", "message"),
    [
        ("axis: 1", "", r"axis 1 is not one of variable size in dims \[-1\]"),
        ('mask_input: "X"', "", "the input must be optional"),
        ("", 'unpadding { output: "Q" }', "serving.unpadding.output 'Q' is not in the config"),
        ("", 'unpadding { output: "Y" input: "M" }', "is none of the padded inputs"),
        ("", 'unpadding { output: "Y" axis: 1 }', "there is no axis 1"),
    ],
)
def test_padding_that_does_not_fit_the_model_is_refused(padding: str, unpadding: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        PaddingPlan.of(padded_config(padding, unpadding))


def test_the_error_names_what_there_is() -> None:
    config = padded_config()
    config.serving.padding[0].input = "Z"
    with pytest.raises(
        InvalidArgument, match=r"serving.padding.input 'Z' is not in the config: it has \['L', 'M', 'X'\]"
    ):
        PaddingPlan.of(config)


def test_models_in_python_get_their_requests_one_by_one() -> None:
    config = padded_config()
    config.backend = "python"
    with pytest.raises(InvalidArgument, match=r"a model.py gets every request by itself"):
        PaddingPlan.of(config)


# --- text encoders


def test_text_encoders_are_padded_without_being_told() -> None:
    plan = PaddingPlan.of(config_of(ENCODER))
    assert [one.name for one in plan.inputs] == ["input_ids", "attention_mask"]
    assert [one.name for one in plan.outputs] == ["last_hidden_state"]


@pytest.mark.parametrize(
    "change",
    [
        "serving { no_derived_padding: true }",
        'backend: "python"',
        "sequence_batching { direct {} }",
    ],
)
def test_padding_is_not_derived_where_it_can_not_work(change: str) -> None:
    assert not PaddingPlan.of(config_of(f"{ENCODER} {change}"))


def test_a_model_that_does_not_batch_needs_no_padding() -> None:
    config = config_of(ENCODER)
    config.max_batch_size = 0
    assert not PaddingPlan.of(config)


def test_a_model_without_an_attention_mask_is_not_taken_for_a_text_encoder() -> None:
    assert not PaddingPlan.of(config_of(ENCODER.replace("attention_mask", "mask")))
