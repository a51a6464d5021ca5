"""The response cache: keys, eviction, and the scheduler in front of the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument, Unavailable
from enginehouse.scheduling.build import may_cache
from enginehouse.scheduling.caches import RemoteCache, make_cache
from enginehouse.scheduling.response_cache import CacheEntry, LocalCache, cache_key
from enginehouse.types import Array, InferRequest, Tensor

from .factories import Rig, batching_config, request_of, rig_of


def cached_config(batching: str = "", max_batch_size: int = 4) -> ModelConfig:
    config = batching_config(batching, max_batch_size)
    config.response_cache.enable = True
    config.output.add(name="Y", data_type=config.output[0].data_type, dims=[1])
    return config


def counting(inputs: dict[str, Array]) -> dict[str, Array]:
    return {"X": inputs["X"], "Y": 10 * inputs["X"]}


def cached_rig(cache: object, batching: str = "", **options: object) -> Rig:
    return rig_of(cached_config(batching), function=counting, cache=cache, **options)  # type: ignore[arg-type]


def key_of(request: InferRequest, version: int = 1) -> bytes:
    return cache_key("m", version, request)


# --- keys


def test_id_parameters_and_outputs_are_no_part_of_the_key() -> None:
    array = np.array([[3]], np.int32)
    one = request_of(array, id="a", parameters={"p": 1}, requested_outputs=["X"])
    assert key_of(one) == key_of(request_of(array))


def test_names_types_shapes_bytes_and_version_are() -> None:
    base = request_of(np.array([[3, 4]], np.int32))
    others = [
        request_of(np.array([[3, 5]], np.int32)),
        request_of(np.array([[3], [4]], np.int32)),
        request_of(np.array([[3, 4]], np.float32)),
    ]
    renamed = request_of(np.array([[3, 4]], np.int32))
    renamed.inputs = {"Z": renamed.inputs["X"]}
    keys = {key_of(request) for request in (base, *others, renamed)} | {key_of(base, version=2)}
    assert len(keys) == 6


def test_the_order_of_inputs_does_not_matter() -> None:
    tensor = Tensor.from_numpy("X", np.zeros(1, np.int32))
    assert key_of(InferRequest("m", inputs={"A": tensor, "B": tensor})) == key_of(
        InferRequest("m", inputs={"B": tensor, "A": tensor})
    )


# --- the local cache


def entry_of(num_bytes: int) -> CacheEntry:
    return CacheEntry((), True, num_bytes)


def test_the_entry_used_longest_ago_makes_room() -> None:
    cache = LocalCache(100)
    for key in (b"a", b"b"):
        cache.put(key, entry_of(40))
    cache.get(b"a")
    cache.put(b"c", entry_of(40))
    assert [key for key in (b"a", b"b", b"c") if cache.get(key)] == [b"a", b"c"]
    assert cache.counts.num_evictions == 1


def test_an_entry_larger_than_the_cache_changes_nothing() -> None:
    cache = LocalCache(100)
    cache.put(b"a", entry_of(60))
    assert not cache.put(b"b", entry_of(101))
    assert cache.get(b"a") is not None


class CacheMachine(RuleBasedStateMachine):
    """Against a dict that forgets in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = LocalCache(10)
        self.model: dict[bytes, int] = {}

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d"]), size=st.integers(1, 12))
    def put(self, key: bytes, size: int) -> None:
        self.cache.put(key, entry_of(size))
        if size > 10:
            return
        self.model.pop(key, None)
        while sum(self.model.values()) + size > 10:
            del self.model[next(iter(self.model))]
        self.model[key] = size

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def get(self, key: bytes) -> None:
        found = self.cache.get(key)
        assert (found.num_bytes if found else None) == self.model.get(key)
        if key in self.model:
            self.model[key] = self.model.pop(key)

    @invariant()
    def bytes_add_up(self) -> None:
        assert self.cache.used_bytes == sum(self.model.values()) <= 10
        assert self.cache.num_entries == len(self.model)


CacheMachine.TestCase.settings = settings(max_examples=30, deadline=None)
TestCacheMachine = CacheMachine.TestCase


@given(st.lists(st.sampled_from(["?", "<i4", "<f2", "<f8", "O"]), max_size=3), st.booleans())
def test_entries_survive_being_bytes(codes: list[str], has_all: bool) -> None:
    arrays = [np.array([["a", "bc"]], object) if code == "O" else np.ones((1, 2), code) for code in codes]
    entry = CacheEntry.of([Tensor.from_numpy(f"T{i}", array) for i, array in enumerate(arrays)], has_all)
    again = CacheEntry.decode(entry.encode())
    assert again.has_all == has_all
    for tensor, array in zip(again.outputs, arrays, strict=True):
        assert tensor.shape == (1, 2)
        assert tensor.numpy().tolist() == Tensor.from_numpy("T", array).numpy().tolist()


# --- the scheduler in front


def test_the_same_inputs_are_answered_without_running_the_model() -> None:
    rig = cached_rig(LocalCache(100_000))
    first = rig.send(3)
    rig.run_all()
    second = rig.send(3, id="other")
    assert not second.responses
    rig.run_all()
    assert second.values() == first.values() == [[3]]
    assert second.responses[0].id == "other"
    assert rig.instance.sizes == [1]
    assert [len(rig.observer.misses), len(rig.observer.hits)] == [1, 1]
    assert rig.scheduler.num_in_flight == 0


def test_a_cached_answer_has_all_outputs_that_were_made() -> None:
    rig = cached_rig(LocalCache(100_000))
    rig.send(3)
    rig.run_all()
    part = rig.send(3, requested_outputs=["X"])
    rig.run_all()
    assert (part.values("X"), part.values("Y")) == ([[3]], [[30]])
    assert rig.instance.sizes == [1]


def test_an_answer_with_fewer_outputs_does_not_serve_who_asks_for_more() -> None:
    rig = cached_rig(LocalCache(100_000))
    rig.send(3, requested_outputs=["X"])
    rig.run_all()
    every = rig.send(3)
    rig.run_all()
    assert every.values("Y") == [[30]]
    assert rig.instance.sizes == [1, 1]


def test_errors_are_not_remembered() -> None:
    rig = cached_rig(LocalCache(100_000))
    rig.send(3)
    rig.clock.run_soon()
    rig.instance.fail("no")
    again = rig.send(3)
    rig.run_all()
    assert again.values() == [[3]]


def test_a_refused_request_leaves_nothing_behind() -> None:
    rig = cached_rig(LocalCache(100_000), "default_queue_policy { max_queue_size: 1 }")
    rig.send(1)
    rig.clock.run_soon()
    rig.send(2)
    with pytest.raises(Unavailable):
        rig.send(3)
    rig.run_all()
    assert rig.scheduler.num_in_flight == 0


def test_preserved_order_holds_a_cached_answer_back() -> None:
    rig = cached_rig(LocalCache(100_000), "preserve_ordering: true")
    rig.send(3)
    rig.run_all()
    slow, cached = rig.send(4), rig.send(3)
    rig.clock.run_soon()
    assert not cached.responses
    rig.run_all()
    assert (slow.values(), cached.values()) == ([[4]], [[3]])


def test_only_models_with_one_answer_and_no_memory_are_cached() -> None:
    assert may_cache(cached_config())
    decoupled, sequences = cached_config(), cached_config()
    decoupled.model_transaction_policy.decoupled = True
    sequences.sequence_batching.direct.SetInParent()
    assert not may_cache(decoupled)
    assert not may_cache(sequences)


# --- caches outside the process


class SlowCache(RemoteCache):
    """Answers when the test opens the gate; breaks when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[bytes, bytes] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_broken = False

    async def read(self, key: bytes) -> bytes | None:
        await self.gate.wait()
        if self.is_broken:
            raise ConnectionError("gone")
        return self.values.get(key)

    async def write(self, key: bytes, value: bytes) -> None:
        if self.is_broken:
            raise ConnectionError("gone")
        self.values[key] = value


@asynccontextmanager
async def remote_rig() -> AsyncIterator[tuple[Rig, SlowCache]]:
    cache = SlowCache()
    rig = cached_rig(cache)
    yield rig, cache
    rig.scheduler.close()
    await asyncio.wait_for(rig.scheduler.drain(), 5)


async def turn(rig: Rig) -> None:
    for _ in range(5):
        await asyncio.sleep(0)
    rig.run_all()
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_a_remote_cache_is_asked_without_holding_up_anyone() -> None:
    async with remote_rig() as (rig, cache):
        cache.gate.clear()
        answers = rig.send(3)
        await turn(rig)
        assert rig.scheduler.num_in_flight == 1
        cache.gate.set()
        await turn(rig)
        assert answers.values() == [[3]]
        again = rig.send(3)
        await turn(rig)
        assert again.values() == [[3]]
        assert rig.instance.sizes == [1]
        assert cache.counts.num_hits == 1


@pytest.mark.asyncio
async def test_a_broken_remote_cache_only_costs_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    async with remote_rig() as (rig, cache):
        cache.is_broken = True
        answers = rig.send(3)
        await turn(rig)
        assert answers.values() == [[3]]
        assert caplog.text.count("ConnectionError: gone") == 1


@pytest.mark.asyncio
async def test_an_unreadable_entry_is_a_miss() -> None:
    async with remote_rig() as (rig, cache):
        rig.send(3)
        await turn(rig)
        for key in cache.values:
            cache.values[key] = b"nonsense"
        answers = rig.send(3)
        await turn(rig)
        assert answers.values() == [[3]]
        assert rig.instance.sizes == [1, 1]


@pytest.mark.asyncio
async def test_a_request_cancelled_during_the_lookup_is_not_run() -> None:
    async with remote_rig() as (rig, cache):
        cache.gate.clear()
        answers = rig.send(3)
        await turn(rig)
        answers.request.cancel()
        cache.gate.set()
        await turn(rig)
        assert answers.error == "Request cancelled"
        assert rig.instance.sizes == []


# --- settings


OWN_CACHE = """
from enginehouse.scheduling.response_cache import LocalCache

def create(settings):
    return LocalCache(int(settings["size"]))
"""


def test_the_server_has_the_cache_that_its_flags_name(tmp_path: Path) -> None:
    assert make_cache({}) is None
    local = make_cache({"local": {"size": "1024"}})
    assert isinstance(local, LocalCache)
    assert local.capacity_bytes == 1024
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "cache.py").write_text(OWN_CACHE)
    own = make_cache({"own": {"size": "7"}}, str(tmp_path))
    assert isinstance(own, LocalCache)
    assert own.capacity_bytes == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local": {"size": "much"}}, "expected a number of bytes, got 'much'"),
        ({"redis": {"port": "6379"}}, "must have host"),
        ({"redsi": {}}, "known are local and redis"),
    ],
)
def test_wrong_cache_settings_are_refused(settings: dict[str, dict[str, str]], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make_cache(settings)
