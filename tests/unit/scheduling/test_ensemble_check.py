"""Ensembles that don't fit their models are refused with the path named."""

from __future__ import annotations

import pytest

from enginehouse.config.schema import TYPE_FP32, ModelConfig
from enginehouse.errors import InvalidArgument, NotFound
from enginehouse.scheduling.ensemble_check import check_ensemble, find_cycle

from .factories import config_of
from .test_ensemble import ADD_SUB, CHAIN, DOUBLE, FAN, ensemble, member, step

MODELS = {
    config.name: config
    for config in map(
        config_of,
        (
            DOUBLE,
            ADD_SUB,
            member("small", "A", "B", max_batch_size=2),
            member("stream", "A", "B", extra="model_transaction_policy { decoupled: true }"),
            member("wide", "A", "B", dims=3),
        ),
    )
}


def lookup(name: str, version: str) -> ModelConfig:
    if name not in MODELS:
        raise NotFound(name)
    return MODELS[name]


def test_a_fitting_graph_passes() -> None:
    assert check_ensemble(CHAIN, lookup) is False
    assert check_ensemble(FAN, lookup) is False


def test_a_decoupled_step_makes_the_ensemble_decoupled() -> None:
    assert check_ensemble(ensemble("P", "Q", step("stream", {"A": "P"}, {"B": "Q"})), lookup) is True


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (
            {"NOPE": "P"},
            {"B": "Q"},
            "in ensemble ens, ensemble tensor P is mapping to non-existing input NOPE in model double",
        ),
        (
            {"A": "P"},
            {"NOPE": "Q"},
            "in ensemble ens, ensemble tensor Q is mapped from non-existing output NOPE in model double",
        ),
        ({}, {"B": "Q"}, "in ensemble ens, input A in model double is not mapped to any ensemble tensors"),
    ],
)
def test_wrong_maps_are_refused(inputs: dict[str, str], outputs: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_ensemble(ensemble("P", "Q", step("double", inputs, outputs)), lookup)
    assert str(refused.value) == message


def test_types_must_agree() -> None:
    config = ensemble("P", "Q", step("double", {"A": "P"}, {"B": "Q"}))
    config.output[0].data_type = TYPE_FP32
    with pytest.raises(InvalidArgument) as refused:
        check_ensemble(config, lookup)
    assert str(refused.value) == (
        "in ensemble ens, ensemble tensor Q: inconsistent data type: TYPE_FP32 is inferred from model ens "
        "while TYPE_INT32 is inferred from model double"
    )


def test_shapes_must_agree_along_the_path() -> None:
    config = ensemble("P", "Q", step("double", {"A": "P"}, {"B": "m"}), step("wide", {"A": "m"}, {"B": "Q"}))
    with pytest.raises(InvalidArgument) as refused:
        check_ensemble(config, lookup)
    assert str(refused.value) == (
        "in ensemble ens, ensemble tensor m: inconsistent shape: [-1,1] is inferred from model double "
        "while [-1,3] is inferred from model wide"
    )


def test_a_member_must_take_the_ensembles_batches() -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_ensemble(ensemble("P", "Q", step("small", {"A": "P"}, {"B": "Q"})), lookup)
    assert str(refused.value) == (
        "ensemble ens allows maximum batch size 4, but it contains model small which only allows maximum "
        "batch size to be 2"
    )


def test_answers_of_two_decoupled_steps_can_not_be_joined() -> None:
    config = ensemble(
        "P", "Q", step("stream", {"A": "P"}, {"B": "a"}), step("stream", {"A": "P"}, {"B": "b"}),
        step("add_sub", {"INPUT0": "a", "INPUT1": "b"}, {"OUTPUT0": "Q"}),
    )  # fmt: skip
    with pytest.raises(InvalidArgument, match="step of model 'add_sub' receives inputs originated from different"):
        check_ensemble(config, lookup)


def test_an_unknown_member_is_what_the_lookup_says() -> None:
    with pytest.raises(NotFound, match="nowhere"):
        check_ensemble(ensemble("P", "Q", step("nowhere", {"A": "P"}, {"B": "Q"})), lookup)


def test_cycles_are_found_with_their_path() -> None:
    graph = {"a": ["leaf", "b"], "b": ["c"], "c": ["a"], "self": ["self"]}

    def members_of(name: str) -> list[str]:
        return graph.get(name, [])

    assert find_cycle("a", members_of) == ["a", "b", "c", "a"]
    assert find_cycle("self", members_of) == ["self", "self"]
    assert find_cycle("leaf", members_of) == []
