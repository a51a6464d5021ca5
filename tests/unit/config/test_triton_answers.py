"""What real Triton answered about these very configs, and what we say about them."""

from __future__ import annotations

import pytest

from enginehouse.config.json_form import to_json, to_wire
from enginehouse.config.schema import ModelConfig
from enginehouse.config.validation import validate, validate_tensors
from enginehouse.errors import EnginehouseError
from enginehouse.execution.placement import Machine, with_explicit_groups

from .config_factories import from_text, recorded

BROKEN = recorded("broken_models.json")
ANSWERS = recorded("config_answers.json")


def _find(name: str) -> ModelConfig:
    config = from_text(BROKEN[name]["config"], name)
    validate(config, name)
    return config


def _load(config: ModelConfig) -> None:
    if not config.HasField("ensemble_scheduling"):
        config = with_explicit_groups(config, Machine())
    validate_tensors(config)


def _of_kind(kind: str) -> list[str]:
    return [name for name, entry in BROKEN.items() if entry["refused"] == kind]


@pytest.mark.parametrize("name", _of_kind("") + _of_kind("model"))
def test_configs_that_triton_finds_no_fault_with(name: str) -> None:
    _load(_find(name))


@pytest.mark.parametrize("name", _of_kind("found"))
def test_configs_that_triton_refuses_when_it_finds_the_model(name: str) -> None:
    with pytest.raises(EnginehouseError):
        _find(name)


@pytest.mark.parametrize("name", _of_kind("version"))
def test_configs_that_triton_refuses_when_a_version_loads(name: str) -> None:
    config = _find(name)
    with pytest.raises(EnginehouseError) as caught:
        _load(config)
    assert f"{caught.value.code}: {caught.value}" == BROKEN[name]["text"]


@pytest.mark.parametrize("name", ANSWERS)
def test_config_answers_equal_tritons(name: str) -> None:
    config = from_text(ANSWERS[name]["config"], name)
    if config.HasField("ensemble_scheduling"):
        config.model_transaction_policy.decoupled = False
    else:
        config = with_explicit_groups(config, Machine())
    answer = to_wire(config)
    assert answer == ANSWERS[name]["answer"]
    assert list(answer) == list(ANSWERS[name]["answer"])


def test_an_empty_config_is_no_text() -> None:
    assert to_json(ModelConfig()) == ""
