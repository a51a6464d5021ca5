"""`auto_complete_config` completes a config and may not contradict it; texts as Triton has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.backends.python_model.models import ModelUnderTest

from enginehouse.config.schema import TYPE_FP32, TYPE_INT64, ModelConfig
from enginehouse.errors import Internal

EMPTY = "max_batch_size: 0"


def completed(folder: Path, statements: str, changes: str = "") -> ModelConfig:
    source = f"""
class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        {statements}
        return config
"""
    return ModelUnderTest(folder, source, changes).complete()


def refusal(folder: Path, statements: str, changes: str = "") -> str:
    with pytest.raises(Internal) as error:
        completed(folder, statements, changes)
    return str(error.value).partition("\n\nAt:\n")[0]


def test_what_the_model_says_is_added(tmp_path: Path) -> None:
    config = completed(
        tmp_path,
        "config.set_max_batch_size(8); config.set_dynamic_batching();"
        "config.add_input({'name': 'Z', 'data_type': 'TYPE_FP32', 'dims': [3], 'optional': True});"
        "config.add_output({'name': 'W', 'data_type': 'TYPE_INT64', 'dims': [-1, 2]});"
        "config.set_model_transaction_policy({'decoupled': True})",
    )
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (8, True)
    assert config.model_transaction_policy.decoupled
    assert [tensor.name for tensor in config.input] == ["X", "Z"]
    assert (config.input[1].data_type, list(config.input[1].dims), config.input[1].optional) == (TYPE_FP32, [3], True)
    assert (config.output[1].data_type, list(config.output[1].dims)) == (TYPE_INT64, [-1, 2])


def test_a_model_without_the_function_leaves_the_config_alone(tmp_path: Path) -> None:
    under_test = ModelUnderTest(tmp_path, "class TritonPythonModel: pass")
    assert under_test.complete() == under_test.context.config


def test_fields_that_it_does_not_touch_stay(tmp_path: Path) -> None:
    changes = 'parameters { key: "a" value { string_value: "b" } } dynamic_batching { max_queue_delay_microseconds: 5 }'
    config = completed(tmp_path, "config.set_dynamic_batching()", changes)
    assert config.parameters["a"].string_value == "b"
    assert config.dynamic_batching.max_queue_delay_microseconds == 5


def test_the_given_config_can_be_read(tmp_path: Path) -> None:
    assert "seen m 1" in refusal(
        tmp_path, "raise ValueError(f\"seen {config.as_dict()['name']} {len(config.as_dict()['input'])}\")"
    )


@pytest.mark.parametrize(
    ("statements", "changes", "text"),
    [
        (
            "config.set_max_batch_size(2)",
            "max_batch_size: 4",
            "configuration specified max_batch_size 4, but in auto-complete-config function for model 'm' specified "
            "max_batch_size 2",
        ),
        (
            "config.set_dynamic_batching()",
            "sequence_batching {}",
            "Configuration specified scheduling_choice as 'sequence_batching', but auto-complete-config function for "
            "model 'm' tries to set scheduling_choice as 'dynamic_batching'",
        ),
        (
            "config.add_input({'name': 'Z', 'dims': [1]})",
            EMPTY,
            "input 'Z' in auto-complete-config function for model 'm' is missing 'data_type' property.",
        ),
        (
            "config.add_output({'name': 'Z', 'data_type': 'TYPE_FP32'})",
            EMPTY,
            "output 'Z' in auto-complete-config function for model 'm' is missing 'dims' property.",
        ),
        (
            "config.add_input({'data_type': 'TYPE_FP32', 'dims': [1]})",
            EMPTY,
            "input in auto-complete-config function for model 'm' is missing 'name' property.",
        ),
        (
            "config.add_output({'name': 'Z', 'data_type': 'TYPE_FP32', 'dims': [1], 'more': 1})",
            EMPTY,
            "output 'Z' in auto-complete-config function for model 'm' contains property other than 'name', "
            "'data_type' and 'dims'.",
        ),
        (
            "config.add_input({'name': 'X', 'data_type': 'TYPE_FP32', 'dims': [-1]})",
            EMPTY,
            "unable to load model 'm', configuration expects datatype TYPE_INT32 for input 'X', model provides "
            "TYPE_FP32",
        ),
        (
            "config.add_output({'name': 'Y', 'data_type': 'TYPE_INT32', 'dims': [4]})",
            EMPTY,
            "model 'm', tensor 'Y': the model expects dims [4] but the model configuration specifies dims [-1]",
        ),
        (
            "config.set_model_transaction_policy({'other': True})",
            EMPTY,
            "model transaction property in auto-complete-config function for model 'm' contains property other than "
            "'decoupled'.",
        ),
        (
            "config.set_model_transaction_policy({'decoupled': False})",
            "model_transaction_policy { decoupled: true }",
            "trying to change decoupled property in auto-complete-config for model 'm', which is already set to "
            "'True'.",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, statements: str, changes: str, text: str) -> None:
    assert refusal(tmp_path, statements, changes) == f"ValueError: {text}"


def test_it_must_give_the_config_back(tmp_path: Path) -> None:
    with pytest.raises(Internal, match=r"must return a valid pb.ModelConfig object"):
        completed(tmp_path, "return 5")
