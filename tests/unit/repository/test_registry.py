"""Which version a request means, and what is said where there is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from enginehouse.errors import EnginehouseError, InvalidArgument, NotFound, Unavailable
from enginehouse.execution.contract import HostHealth, HostState
from enginehouse.repository.registry import IndexEntry, Registry, VersionState

from .factories import served


def registry_with(*versions: int) -> Registry:
    registry = Registry()
    for version in versions:
        registry.set_state("m", version, VersionState.READY, served=served(version=version))
    return registry


def test_no_version_means_the_highest_ready_one() -> None:
    assert registry_with(2, 10, 3).find("m").version == 10


def test_leading_zeros_name_the_same_version() -> None:
    assert registry_with(3).find("m", "03").version == 3


@pytest.mark.parametrize(
    ("name", "version", "kind", "text"),
    [
        ("nobody", "", NotFound, "Request for unknown model: 'nobody' is not found"),
        ("m", "7", NotFound, "Request for unknown model: 'm' version 7 is not found"),
        (
            "m",
            "abc",
            InvalidArgument,
            "failed to get model version from specified version string 'abc' (details: stol), version should "
            "be an integral value > 0",
        ),
        ("m", "-1", InvalidArgument, "invalid model version specified '-1' , version should be an integral value > 0"),
        (
            "m",
            "9" * 20,
            InvalidArgument,
            f"failed to get model version from specified version string '{'9' * 20}' (details: stol), version "
            "should be an integral value > 0",
        ),
    ],
)
def test_refusals_have_tritons_texts(name: str, version: str, kind: type[EnginehouseError], text: str) -> None:
    with pytest.raises(kind) as caught:
        registry_with(1).find(name, version)
    assert caught.value.message == text


def test_version_that_is_going_is_not_at_ready_state() -> None:
    registry = registry_with(1)
    registry.set_state("m", 1, VersionState.UNLOADING)
    with pytest.raises(Unavailable, match="'m' version 1 is not at ready state"):
        registry.find("m", "1")
    with pytest.raises(NotFound, match="'m' has no available versions"):
        registry.find("m")


def test_a_version_whose_host_is_down_is_not_ready() -> None:
    registry = registry_with(1)
    registry.find("m").healthy = False
    assert not registry.is_ready("m")
    assert not registry.is_ready("m", "1")
    assert not registry.all_settled_ready()


def test_the_index_says_of_a_version_whose_host_is_down_that_it_restarts() -> None:
    registry = registry_with(1)
    served = registry.find("m", "1")
    served.hosted = SimpleNamespace(health=HostHealth(HostState.RESTARTING, "its process was killed"))
    served.healthy = False
    [entry] = registry.index(["m"])
    assert (entry.state, entry.reason) == ("UNAVAILABLE", "restarting: its process was killed")
    assert registry.index(["m"], ready_only=True) == []
    served.healthy = True
    assert [entry.state for entry in registry.index(["m"], ready_only=True)] == ["READY"]


def test_strict_readiness_forgives_what_was_unloaded_on_purpose() -> None:
    registry = registry_with(1, 2)
    registry.set_state("m", 1, VersionState.UNAVAILABLE, "unloaded")
    assert registry.all_settled_ready()
    registry.set_state("m", 1, VersionState.UNAVAILABLE, "Internal: broken")
    assert not registry.all_settled_ready()


def test_index_lists_untried_models_by_name_alone() -> None:
    registry = registry_with(1)
    registry.set_state("m", 2, VersionState.UNAVAILABLE, "Internal: broken")
    assert registry.index(["m", "untried"]) == [
        IndexEntry("m", "1", "READY", ""),
        IndexEntry("m", "2", "UNAVAILABLE", "Internal: broken"),
        IndexEntry("untried"),
    ]
    assert registry.index(["m", "untried"], ready_only=True) == [IndexEntry("m", "1", "READY", "")]
