"""Completing a config from what an artifact says, and checking one against it."""

from __future__ import annotations

import pytest
from google.protobuf import text_format

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.types import DataType, TensorSpec
from enginehouse_backends.signature import Signature, check_config, complete_config

IMAGE = TensorSpec("image", DataType.FP32, (-1, 3, 8))
MASK = TensorSpec("mask", DataType.INT64, (-1, 8), optional=True)
LABEL = TensorSpec("label", DataType.INT64, (-1,))
SCORES = TensorSpec("scores", DataType.FP32, (-1, 10))
BATCHING = Signature("1/model.x", (IMAGE, MASK), (LABEL, SCORES))
FIXED = Signature("1/model.x", (TensorSpec("image", DataType.FP32, (1, 8)),), (SCORES,))


def config(text: str = "") -> ModelConfig:
    return text_format.Parse(f'name: "m" {text}', ModelConfig())


def completed(text: str = "", signature: Signature = BATCHING, default: int = 4) -> ModelConfig:
    return complete_config(config(text), signature, default)


def test_empty_config_gets_tensors_batch_size_and_dynamic_batching() -> None:
    assert completed() == config(
        """
        max_batch_size: 4 dynamic_batching { }
        input { name: "image" data_type: TYPE_FP32 dims: [3, 8] }
        output { name: "label" data_type: TYPE_INT64 dims: [1] reshape { } }
        output { name: "scores" data_type: TYPE_FP32 dims: [10] }
        """
    )


def test_model_with_a_fixed_first_dimension_gets_no_batches() -> None:
    result = completed(signature=FIXED)
    assert result.max_batch_size == 0
    assert not result.HasField("dynamic_batching")
    assert list(result.input[0].dims) == [1, 8]


def test_batch_size_for_a_model_that_cannot_batch_is_an_error_that_names_the_file() -> None:
    with pytest.raises(InvalidArgument, match=r"does not support batching .* \(1/model\.x fixes"):
        completed("max_batch_size: 4", FIXED)


def test_config_that_lists_inputs_and_outputs_decides_about_batching_itself() -> None:
    text = 'input { name: "image" dims: [2, 3, 8] } output { name: "scores" data_type: TYPE_FP32 dims: [2, 10] }'
    result = completed(text)
    assert result.max_batch_size == 0
    assert result.input[0].data_type == DataType.FP32.proto


def test_gaps_of_a_listed_output_are_filled_and_the_rest_kept() -> None:
    result = completed('output { name: "scores" label_filename: "labels.txt" }')
    (output,) = result.output
    assert (output.data_type, list(output.dims), output.label_filename) == (11, [10], "labels.txt")
    assert [tensor.name for tensor in result.input] == ["image"]


def test_the_scheduler_that_the_config_chose_stays() -> None:
    assert completed("sequence_batching { }").WhichOneof("scheduling_choice") == "sequence_batching"


def test_default_batch_size_of_one_means_no_dynamic_batching() -> None:
    result = completed(default=1)
    assert result.max_batch_size == 1
    assert result.WhichOneof("scheduling_choice") is None


def test_state_tensors_are_not_offered_to_clients() -> None:
    result = completed('sequence_batching { state { input_name: "image" output_name: "scores" } }')
    assert [tensor.name for tensor in result.input] == []
    assert [tensor.name for tensor in result.output] == ["label"]


def test_completing_a_complete_config_changes_nothing() -> None:
    once = completed()
    assert complete_config(once, BATCHING) == once
    check_config(once, BATCHING)


def test_optional_input_may_be_listed() -> None:
    text = 'input { name: "mask" optional: true } input { name: "image" }'
    check_config(complete_config(config(text), BATCHING), BATCHING)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('input { name: "imag" }', r"'imag' in the config of model 'm'.*'image', 'mask'.*did you mean 'image'"),
        (
            'input { name: "image" data_type: TYPE_INT8 }',
            r"expects datatype TYPE_INT8 for input 'image', model provides TYPE_FP32 \(1/model\.x\)",
        ),
        (
            'input { name: "image" dims: [3, 9] }',
            r"expects shape \[-1, 3, 9\] for input 'image' \(max_batch_size is 4.*model provides \[-1, 3, 8\]",
        ),
        ('input { name: "mask" }', r"configuration expects 1 inputs, model provides 2: .* also needs 'image'"),
        ('input { name: "image" optional: true }', r"input 'image' is optional, but 1/model\.x has no default"),
        ('sequence_batching { control_input { name: "START" } }', r"names the tensor 'START'"),
    ],
)
def test_difference_between_config_and_artifact_is_an_error_that_says_what(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        check_config(completed(text), BATCHING)


def test_output_that_no_tensor_can_hold_is_left_out_and_refused_when_asked_for() -> None:
    signature = Signature("1/model.x", (IMAGE,), (SCORES,), unusable={"by_class": "sequence"})
    assert [output.name for output in completed(signature=signature).output] == ["scores"]
    with pytest.raises(InvalidArgument, match=r"'by_class' of 1/model\.x is a sequence"):
        check_config(completed('output { name: "by_class" }', signature), signature)


RAGGED = """name: "m" max_batch_size: 8
    input { name: "X" data_type: TYPE_FP32 dims: [-1] allow_ragged_batch: true }
    output { name: "Y" data_type: TYPE_FP32 dims: [-1] }
    batch_input { kind: BATCH_ELEMENT_COUNT target_name: "N" data_type: TYPE_FP32 source_input: "X" }
    batch_output { target_name: "Y" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "X" }"""


def flat_signature(dims: tuple[int, ...]) -> Signature:
    inputs = (TensorSpec("X", DataType.FP32, dims), TensorSpec("N", DataType.FP32, (-1,)))
    return Signature("model.onnx", inputs, (TensorSpec("Y", DataType.FP32, (-1,)),))


def test_a_ragged_input_is_flat_in_the_model() -> None:
    config = text_format.Parse(RAGGED, ModelConfig())
    check_config(config, flat_signature((-1,)))
    with pytest.raises(InvalidArgument, match=r"as one flat tensor, but the model provides \[-1, 4\]"):
        check_config(config, flat_signature((-1, 4)))


def test_a_mask_that_the_server_fills_may_be_optional_for_clients() -> None:
    config = text_format.Parse(
        """name: "m" max_batch_size: 8
        input { name: "X" data_type: TYPE_FP32 dims: [-1] }
        input { name: "M" data_type: TYPE_FP32 dims: [-1] optional: true }
        output { name: "Y" data_type: TYPE_FP32 dims: [-1] }
        serving { padding { input: "X" mask_input: "M" } }""",
        ModelConfig(),
    )
    specs = tuple(TensorSpec(name, DataType.FP32, (-1, -1)) for name in ("X", "M", "Y"))
    check_config(config, Signature("model.onnx", specs[:2], specs[2:]))
