"""The JSON Schema accepts what the server accepts."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from enginehouse.config.comments import comments
from enginehouse.config.json_schema import json_schema
from enginehouse.config.plain import to_plain
from enginehouse.config.schema import ModelConfig

from .config_factories import from_text, recorded

VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def accepts(content: Any) -> bool:
    return bool(VALIDATOR.is_valid(content))


def test_it_is_a_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("name", recorded("config_answers.json"))
def test_real_configs_are_accepted(name: str) -> None:
    assert accepts(to_plain(from_text(recorded("config_answers.json")[name]["config"])))


@pytest.mark.parametrize(
    "content",
    [
        "input: {name: X, data_type: fp32, dims: 3}",
        "input: [{name: X, data_type: TYPE_FP32, dims: [-1], reshape: [2, 3]}]",
        "version_policy: {latest: 2}",
        "version_policy: {all: true}",
        "parameters: {a: b, c: 1, d: {string_value: e}}",
        "response_cache: true",
        "serving: {host: process, python: {variables: {a: b}}}",
    ],
)
def test_short_forms_are_accepted(content: str) -> None:
    assert accepts(yaml.safe_load(content))


@pytest.mark.parametrize(
    "content",
    [
        "max_batch_sise: 1",
        "max_batch_size: many",
        "input: {data_type: fp33}",
        "{dynamic_batching: {}, sequence_batching: {}}",
        "serving: {host: moon}",
    ],
)
def test_mistakes_are_refused(content: str) -> None:
    assert not accepts(yaml.safe_load(content))


def test_every_field_has_a_description() -> None:
    def missing(message: Any, name: str) -> list[str]:
        fields = [f"{name}.{field.name}" for field in message.fields if f"{name}.{field.name}" not in comments()]
        for nested in message.nested_types:
            if not nested.GetOptions().map_entry:
                fields += missing(nested, f"{name}.{nested.name}")
        return fields

    messages = ModelConfig.DESCRIPTOR.file.message_types_by_name.items()
    assert [entry for name, message in messages for entry in missing(message, name)] == []
