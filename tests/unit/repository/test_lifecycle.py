"""What a load leaves behind, whether it succeeds or not."""

from __future__ import annotations

import asyncio
import time

import pytest

from enginehouse.errors import Internal, InvalidArgument
from enginehouse.repository.definition import ModelDefinition
from enginehouse.repository.lifecycle import Lifecycle
from enginehouse.repository.registry import Registry, VersionState

from .factories import Builder, Source, definition


class Repository:
    """A lifecycle over models in memory."""

    def __init__(self, *models: ModelDefinition) -> None:
        self.registry = Registry()
        self.source = Source({model.name: model for model in models})
        self.builder = Builder(self.registry)
        self.lifecycle = Lifecycle(self.registry, self.source, self.builder)

    def put(self, model: ModelDefinition) -> None:
        self.source.models[model.name] = model

    def states(self, name: str) -> dict[int, tuple[VersionState, str]]:
        record = self.registry.models[name]
        return {number: (entry.state, entry.reason) for number, entry in record.versions.items()}


ENSEMBLE = 'ensemble_scheduling { step { model_name: "m" } }'


@pytest.mark.asyncio
async def test_loaded_versions_are_ready_and_the_highest_is_the_default() -> None:
    repository = Repository(definition(versions={2: "a", 10: "b"}))
    await repository.lifecycle.load("m")
    assert repository.registry.find("m").version == 10
    assert repository.registry.find("m").ready_versions == ["2", "10"]


@pytest.mark.asyncio
async def test_unknown_model_fails_to_poll() -> None:
    with pytest.raises(Internal, match="failed to load 'nobody', failed to poll from model repository"):
        await Repository().lifecycle.load("nobody")


@pytest.mark.asyncio
async def test_failed_load_says_why_in_the_index() -> None:
    repository = Repository(definition())
    repository.builder.broken.add(("m", 1))
    with pytest.raises(InvalidArgument) as caught:
        await repository.lifecycle.load("m")
    reason = "Invalid argument: no luck"
    assert caught.value.message == f"load failed for model 'm': version 1 is at UNAVAILABLE state: {reason};\n"
    assert repository.states("m") == {1: (VersionState.UNAVAILABLE, reason)}


@pytest.mark.asyncio
async def test_failed_reload_keeps_the_old_version_serving() -> None:
    repository = Repository(definition())
    await repository.lifecycle.load("m")
    before = repository.registry.find("m")
    repository.put(definition(versions={1: "changed"}))
    repository.builder.broken.add(("m", 1))
    with pytest.raises(InvalidArgument):
        await repository.lifecycle.load("m")
    assert repository.registry.find("m") is before
    assert repository.states("m") == {1: (VersionState.READY, "Invalid argument: no luck")}


@pytest.mark.asyncio
async def test_a_model_that_cannot_be_read_any_more_serves_on_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    repository = Repository(definition())
    await repository.lifecycle.load("m")
    repository.source.broken["m"] = "m/config.pbtxt:1:1: no"
    for _ in range(3):
        await repository.lifecycle.refresh()
    assert repository.states("m") == {1: (VersionState.READY, "failed to poll: m/config.pbtxt:1:1: no")}
    assert len([record for record in caplog.records if "Poll failed" in record.getMessage()]) == 1
    repository.source.broken.clear()
    await repository.lifecycle.refresh()
    assert repository.states("m") == {1: (VersionState.READY, "")}


@pytest.mark.asyncio
async def test_one_bad_version_fails_the_whole_load() -> None:
    repository = Repository(definition(versions={1: "a", 2: "b"}))
    repository.builder.broken.add(("m", 2))
    with pytest.raises(InvalidArgument):
        await repository.lifecycle.load("m")
    assert not repository.registry.is_ready("m")
    assert repository.builder.up == []


@pytest.mark.asyncio
async def test_unchanged_model_is_not_loaded_again() -> None:
    repository = Repository(definition())
    await repository.lifecycle.load("m")
    before = repository.registry.find("m")
    await repository.lifecycle.load("m")
    assert repository.registry.find("m") is before


@pytest.mark.asyncio
async def test_replaced_version_serves_until_the_new_one_is_ready_and_is_then_retired() -> None:
    repository = Repository(definition())
    await repository.lifecycle.load("m")
    before = repository.registry.find("m")
    repository.put(definition(versions={1: "changed"}))
    await repository.lifecycle.load("m")
    after = repository.registry.find("m")
    await repository.lifecycle.wait_retired()
    assert after is not before
    assert repository.builder.up == [after]


@pytest.mark.asyncio
async def test_new_version_replaces_the_one_that_the_policy_drops() -> None:
    repository = Repository(definition(versions={1: "a"}))
    await repository.lifecycle.load("m")
    repository.put(definition(versions={2: "b"}))
    await repository.lifecycle.load("m")
    await repository.lifecycle.wait_retired()
    assert repository.states("m") == {
        1: (VersionState.UNAVAILABLE, "unloaded"),
        2: (VersionState.READY, ""),
    }


@pytest.mark.asyncio
async def test_changing_only_the_instance_count_loads_nothing() -> None:
    repository = Repository(definition(text="instance_group { count: 1 }"))
    await repository.lifecycle.load("m")
    before = repository.registry.find("m")
    repository.put(definition(text="instance_group { count: 3 }"))
    await repository.lifecycle.load("m")
    assert repository.registry.find("m") is before
    assert repository.builder.resized == ["m"]


@pytest.mark.asyncio
async def test_unloaded_model_is_unloading_until_its_last_request_is_answered() -> None:
    repository = Repository(definition())
    await repository.lifecycle.load("m")
    repository.builder.busy = asyncio.Event()
    await repository.lifecycle.unload("m")
    assert repository.states("m") == {1: (VersionState.UNLOADING, "")}
    assert not repository.registry.is_ready("m")
    repository.builder.busy.set()
    await repository.lifecycle.wait_retired()
    assert repository.states("m") == {1: (VersionState.UNAVAILABLE, "unloaded")}


@pytest.mark.asyncio
async def test_unloading_an_unknown_model_is_no_error() -> None:
    await Repository().lifecycle.unload("nobody")


@pytest.mark.asyncio
async def test_loading_an_ensemble_loads_its_members_first() -> None:
    repository = Repository(definition(), definition("e", text=ENSEMBLE))
    await repository.lifecycle.load("e")
    assert [built.name for built in repository.builder.up] == ["m", "e"]


@pytest.mark.asyncio
async def test_unloading_a_member_takes_its_ensemble_down() -> None:
    repository = Repository(definition(), definition("e", text=ENSEMBLE))
    await repository.lifecycle.load("e")
    await repository.lifecycle.unload("m")
    assert not repository.registry.is_ready("e")


@pytest.mark.asyncio
async def test_an_ensemble_comes_back_with_the_member_that_took_it_down() -> None:
    repository = Repository(definition(), definition("e", text=ENSEMBLE))
    await repository.lifecycle.load("e")
    await repository.lifecycle.unload("m")
    await repository.lifecycle.load("m")
    assert repository.registry.is_ready("e")


@pytest.mark.asyncio
async def test_an_ensemble_that_was_unloaded_itself_stays_away() -> None:
    repository = Repository(definition(), definition("e", text=ENSEMBLE))
    await repository.lifecycle.load("e")
    await repository.lifecycle.unload("m")
    await repository.lifecycle.unload("e")
    await repository.lifecycle.load("m")
    assert not repository.registry.is_ready("e")


@pytest.mark.asyncio
@pytest.mark.parametrize("loaded_by_hand", [True, False])
async def test_unloading_an_ensemble_with_its_dependents_spares_what_was_loaded_by_hand(
    loaded_by_hand: bool,
) -> None:
    repository = Repository(definition(), definition("e", text=ENSEMBLE))
    if loaded_by_hand:
        await repository.lifecycle.load("m")
    await repository.lifecycle.load("e")
    await repository.lifecycle.unload("e", unload_dependents=True)
    assert repository.registry.is_ready("m") is loaded_by_hand


@pytest.mark.asyncio
async def test_ensemble_that_contains_itself_is_refused_with_the_path() -> None:
    repository = Repository(definition("e", text='ensemble_scheduling { step { model_name: "e" } }'))
    with pytest.raises(InvalidArgument) as caught:
        await repository.lifecycle.load("e")
    text = "load failed for model 'e': circular dependency between ensembles: e -> ... -> e -> e\n"
    assert caught.value.message == text


@pytest.mark.asyncio
async def test_ensemble_names_the_member_that_is_not_there() -> None:
    repository = Repository(definition("e", text=ENSEMBLE))
    with pytest.raises(InvalidArgument, match="e contains models that are not available or ambiguous: m"):
        await repository.lifecycle.load("e")
    assert "e" not in repository.registry.models


@pytest.mark.asyncio
async def test_model_without_versions_is_refused_and_leaves_no_line_in_the_index() -> None:
    repository = Repository(definition(versions={}))
    with pytest.raises(InvalidArgument, match="at least one version must be available"):
        await repository.lifecycle.load("m")
    assert repository.registry.index(["m"]) == []


@pytest.mark.asyncio
async def test_refresh_follows_the_repository() -> None:
    repository = Repository(definition("old"), definition("kept"))
    await repository.lifecycle.refresh()
    del repository.source.models["old"]
    repository.put(definition("new"))
    await repository.lifecycle.refresh()
    ready = [name for name in ("old", "kept", "new") if repository.registry.is_ready(name)]
    assert ready == ["kept", "new"]


@pytest.mark.asyncio
async def test_refresh_tries_a_broken_model_again_only_when_it_has_changed() -> None:
    repository = Repository(definition())
    repository.builder.broken.add(("m", 1))
    await repository.lifecycle.refresh()
    repository.builder.broken.clear()
    await repository.lifecycle.refresh()
    assert not repository.registry.is_ready("m")
    repository.put(definition(versions={1: "mended"}))
    await repository.lifecycle.refresh()
    assert repository.registry.is_ready("m")


def crowded(*models: ModelDefinition) -> Repository:
    """Room for two models of ten bytes each."""
    repository = Repository(*models)
    repository.builder.sizes = {model.name: 10 for model in models}
    repository.builder.limit = 20
    return repository


@pytest.mark.asyncio
async def test_a_load_that_needs_room_evicts_the_model_idle_the_longest() -> None:
    repository = crowded(definition("a"), definition("b"), definition("c"))
    await repository.lifecycle.load("a")
    await repository.lifecycle.load("b")
    repository.registry.find("a").last_used_ns = time.monotonic_ns()
    await repository.lifecycle.load("c")
    assert [one.name for one in repository.builder.up] == ["a", "c"]
    assert repository.registry.models["b"].on_demand


@pytest.mark.asyncio
async def test_pinned_models_are_not_evicted_and_the_refusal_has_the_numbers() -> None:
    pinned = "serving { residency: RESIDENCY_PINNED }"
    repository = crowded(definition("a", text=pinned), definition("b", text=pinned), definition("c"))
    await repository.lifecycle.load("a")
    await repository.lifecycle.load("b")
    with pytest.raises(InvalidArgument, match="Resource exhausted: model 'c' doesn't fit"):
        await repository.lifecycle.load("c")
    assert [one.name for one in repository.builder.up] == ["a", "b"]


@pytest.mark.asyncio
async def test_evicting_a_member_leaves_its_ensemble_up() -> None:
    repository = crowded(definition(), definition("e", text=ENSEMBLE), definition("x"), definition("y"))
    repository.builder.sizes["e"] = 0
    for name in ("e", "x", "y"):
        await repository.lifecycle.load(name)
    assert not repository.registry.is_ready("m")
    assert repository.registry.is_ready("e")


@pytest.mark.asyncio
async def test_idle_models_go_when_their_time_is_over() -> None:
    repository = Repository(definition(text="serving { idle_unload_s: 60 }"), definition("stays"))
    for name in ("m", "stays"):
        await repository.lifecycle.load(name)
    repository.registry.find("m").last_used_ns = time.monotonic_ns() - 61 * 10**9
    assert await repository.lifecycle.unload_idle() == ["m"]
    assert repository.registry.models["m"].on_demand
    assert repository.registry.is_ready("stays")


@pytest.mark.asyncio
async def test_a_model_that_is_asked_while_others_go_stays() -> None:
    text = "serving { idle_unload_s: 60 }"
    repository = Repository(definition("a", text=text), definition("b", text=text))
    for name in ("a", "b"):
        await repository.lifecycle.load(name)
        repository.registry.find(name).last_used_ns = time.monotonic_ns() - 61 * 10**9
    repository.builder.busy = asyncio.Event()
    unloading = asyncio.create_task(repository.lifecycle.unload_idle())
    await asyncio.sleep(0)
    repository.registry.find("b").last_used_ns = time.monotonic_ns()
    repository.builder.busy.set()
    assert await unloading == ["a"]
    assert repository.registry.is_ready("b")
