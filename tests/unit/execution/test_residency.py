"""Who is unloaded when memory is short, and who stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from enginehouse.execution.residency import Residency, Resident, choose_victims, outstayed


def resident(
    name: str,
    num_bytes: int = 10,
    *,
    idle_s: float = 1.0,
    reload_s: float = 1.0,
    residency: Residency = Residency.AUTO,
    is_busy: bool = False,
    idle_unload_s: float = 0.0,
    device: str = "cpu",
) -> Resident:
    return Resident(name, residency, {device: num_bytes}, idle_s, reload_s, is_busy, idle_unload_s)


def test_least_recently_used_goes_first() -> None:
    models = [resident("fresh", idle_s=1), resident("stale", idle_s=9)]
    assert choose_victims(models, {"cpu": 5}) == ["stale"]


def test_what_is_cheap_to_load_again_goes_before_what_is_dear() -> None:
    models = [resident("dear", idle_s=9, reload_s=30), resident("cheap", idle_s=3, reload_s=0.1)]
    assert choose_victims(models, {"cpu": 5}) == ["cheap"]


def test_pinned_models_stay_even_if_nothing_else_can_go() -> None:
    assert choose_victims([resident("pinned", residency=Residency.PINNED)], {"cpu": 5}) == []


def test_ttl_protects_until_it_is_over() -> None:
    young = resident("m", residency=Residency.TTL, idle_s=5, idle_unload_s=60)
    old = resident("m", residency=Residency.TTL, idle_s=61, idle_unload_s=60)
    assert choose_victims([young], {"cpu": 5}) == []
    assert choose_victims([old], {"cpu": 5}) == ["m"]


def test_busy_models_go_last() -> None:
    models = [resident("busy", idle_s=9, is_busy=True), resident("idle", idle_s=1)]
    assert choose_victims(models, {"cpu": 5}) == ["idle"]


def test_nobody_goes_for_a_load_that_would_not_fit_anyway() -> None:
    assert choose_victims([resident("a"), resident("b")], {"cpu": 25}) == []


def test_other_devices_are_left_alone() -> None:
    models = [resident("gpu", device="cuda:0", idle_s=9), resident("cpu", idle_s=1)]
    assert choose_victims(models, {"cpu": 5}) == ["cpu"]


def test_a_small_model_stays_if_a_big_one_alone_is_enough() -> None:
    models = [resident("small", 1, idle_s=9), resident("big", 10, idle_s=5)]
    assert choose_victims(models, {"cpu": 8}) == ["big"]


def test_idle_time_unloads_only_who_asked_for_it_and_has_no_work() -> None:
    models = [
        resident("done", idle_s=9, idle_unload_s=5),
        resident("busy", idle_s=9, idle_unload_s=5, is_busy=True),
        resident("young", idle_s=1, idle_unload_s=5),
        resident("stays", idle_s=9),
    ]
    assert outstayed(models) == ["done"]


@given(
    st.lists(st.tuples(st.integers(1, 5), st.floats(0, 9), st.booleans()), max_size=6),
    st.integers(1, 20),
)
def test_victims_free_enough_and_none_of_them_is_spare(drawn: list[tuple[int, float, bool]], missing: int) -> None:
    models = [
        resident(str(index), size, idle_s=idle_s, residency=Residency.PINNED if pinned else Residency.AUTO)
        for index, (size, idle_s, pinned) in enumerate(drawn)
    ]
    sizes = {model.name: model.bytes_by_device["cpu"] for model in models}
    victims = choose_victims(models, {"cpu": missing})
    freed = sum(sizes[name] for name in victims)
    evictable = sum(sizes[model.name] for model in models if model.is_evictable)
    assert (freed >= missing) == bool(victims)
    assert bool(victims) == (evictable >= missing)
    assert all(freed - sizes[name] < missing for name in victims)
