"""Ragged inputs reach the model flat, with tensors that say where each request's elements are."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf import text_format

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import Internal
from enginehouse.execution.joiners import joiner_of
from enginehouse.types import Array, DataType, InferRequest, Tensor


def ragged_config(extra: str = "", datatype: str = "TYPE_FP32") -> ModelConfig:
    config = ModelConfig()
    text_format.Parse(
        f"""name: "m" max_batch_size: 8
        input {{ name: "X" data_type: {datatype} dims: [-1] allow_ragged_batch: true }}
        output {{ name: "Y" data_type: {datatype} dims: [-1] }} {extra}""",
        config,
    )
    return config


def batch_input(kind: str, datatype: str = "TYPE_INT32") -> str:
    return f'batch_input {{ kind: {kind} target_name: "B" data_type: {datatype} source_input: "X" }}'


def requests_of(*arrays: Array) -> list[InferRequest]:
    return [
        InferRequest("m", inputs={"X": Tensor.from_numpy("X", array)}, batch_size=array.shape[0]) for array in arrays
    ]


THREE = [np.full((1, n), n, np.float32) for n in (3, 4, 5)]


def joined(config: ModelConfig, arrays: list[Array]) -> dict[str, Tensor]:
    return {tensor.name: tensor.gather() for tensor in joiner_of(config).join(requests_of(*arrays))}


def test_a_ragged_input_is_one_flat_tensor() -> None:
    tensor = joined(ragged_config(), THREE)["X"]
    assert tensor.shape == (12,)
    assert tensor.numpy().tolist() == [3] * 3 + [4] * 4 + [5] * 5


def test_a_single_request_is_flat_too() -> None:
    assert joined(ragged_config(), [np.ones((2, 3), np.float32)])["X"].shape == (6,)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("BATCH_ELEMENT_COUNT", [3, 4, 5]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT", [3, 7, 12]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", [0, 3, 7, 12]),
        ("BATCH_ITEM_SHAPE", [[3], [4], [5]]),
        ("BATCH_ITEM_SHAPE_FLATTEN", [3, 4, 5]),
    ],
)
@pytest.mark.parametrize("datatype", ["TYPE_INT32", "TYPE_FP32"])
def test_batch_inputs_say_how_much_each_request_has(kind: str, expected: object, datatype: str) -> None:
    tensor = joined(ragged_config(batch_input(kind, datatype)), THREE)["B"]
    assert tensor.numpy().tolist() == expected
    assert tensor.datatype.config_name == datatype


def test_the_largest_count_can_be_a_shape() -> None:
    assert joined(ragged_config(batch_input("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE")), THREE)["B"].shape == (5,)


def test_item_shapes_have_a_row_for_every_row_of_a_request() -> None:
    arrays = [np.ones((2, 3, 1), np.float32), np.ones((1, 4, 2), np.float32)]
    config = ragged_config(batch_input("BATCH_ITEM_SHAPE"))
    assert joined(config, arrays)["B"].numpy().tolist() == [[3, 1], [3, 1], [4, 2]]
    flat = ragged_config(batch_input("BATCH_ITEM_SHAPE_FLATTEN"))
    assert joined(flat, arrays)["B"].numpy().tolist() == [3, 1, 3, 1, 4, 2]


def test_a_batch_input_can_have_several_names() -> None:
    config = ragged_config(batch_input("BATCH_ELEMENT_COUNT"))
    config.batch_input[0].target_name.append("AGAIN")
    assert set(joined(config, THREE)) == {"X", "B", "AGAIN"}


SCATTER = 'batch_output { kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "Y" source_input: "X" }'


@pytest.mark.parametrize("datatype", [DataType.FP32, DataType.BYTES])
def test_a_scattered_output_has_the_shapes_of_the_inputs(datatype: DataType) -> None:
    arrays = [np.ones((1, 3), np.float32), np.ones((2, 2), np.float32)]
    values = np.arange(7).astype(np.float32)
    flat = values if datatype is DataType.FP32 else np.array([str(v) * int(v) for v in values], object)
    outputs = {"Y": Tensor.from_numpy("Y", flat)}
    first, second = joiner_of(ragged_config(SCATTER)).split(requests_of(*arrays), outputs)
    assert [first[0].shape, second[0].shape] == [(1, 3), (2, 2)]
    decoded = np.concatenate([first[0].numpy().reshape(-1), second[0].numpy().reshape(-1)]).tolist()
    assert decoded == outputs["Y"].numpy().tolist()


def test_an_output_that_does_not_add_up_is_an_error() -> None:
    outputs = {"Y": Tensor.from_numpy("Y", np.zeros(5, np.float32))}
    with pytest.raises(Internal, match="can't be cut into the shapes of input 'X'"):
        joiner_of(ragged_config(SCATTER)).split(requests_of(*THREE), outputs)
