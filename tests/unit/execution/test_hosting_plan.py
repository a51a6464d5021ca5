"""Config, backend and placements decide which process an instance goes into."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from google.protobuf import text_format

from enginehouse.backend import Backend, HostKind, LoadContext, MemoryNeeds, Model, Placement
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.execution.hosting_plan import (
    MAX_FIRST_SEGMENT_BYTES,
    HostingPlan,
    ProcessKey,
    declared_memory,
    first_segment_bytes,
    memory_entries,
    plan_hosting,
)
from enginehouse.execution.placement import Machine, with_explicit_groups

MACHINE = Machine(["cuda:0", "cuda:1"])
ON_TWO = (Placement("m_0", "cuda:0"), Placement("m_1", "cuda:1"))


class Threads(Backend):
    name = "threads"

    def load(self, context: LoadContext) -> Model:
        raise NotImplementedError


class Engine(Threads):
    def host_kind(self, config: ModelConfig) -> HostKind:
        return HostKind.PROCESS

    def host_group(self, config: ModelConfig) -> str:
        return "engines"


class Apart(Threads):
    process_per_instance = True

    def host_kind(self, config: ModelConfig) -> HostKind:
        return HostKind.PROCESS


def parse(text: str) -> ModelConfig:
    return text_format.Parse(f'name: "m" backend: "b" {text}', ModelConfig())


def plan(text: str, backend: Backend, defaults: Mapping[str, HostKind] | None = None) -> HostingPlan:
    return plan_hosting(with_explicit_groups(parse(text), MACHINE), backend, defaults or {})


CPU = "instance_group { kind: KIND_CPU }"


def test_the_config_decides_before_the_server_and_the_server_before_the_backend() -> None:
    assert plan(CPU, Threads()).kind is HostKind.THREAD
    assert plan(CPU, Threads(), {"b": HostKind.PROCESS}).kind is HostKind.PROCESS
    assert plan(CPU + "serving { host: HOST_THREAD }", Threads(), {"b": HostKind.PROCESS}).kind is HostKind.THREAD


def test_what_runs_on_a_gpu_runs_in_its_process() -> None:
    made = plan("instance_group { kind: KIND_GPU }", Threads())
    assert made.key_of is not None
    keys = [made.key_of(placement) for placement in ON_TWO]
    assert [(key.shared, key.device) for key in keys] == [(True, "cuda:0"), (True, "cuda:1")]


def test_models_share_a_devices_process_unless_they_name_different_ones() -> None:
    one, two, other = (
        plan(f"{CPU} serving {{ host: HOST_DEVICE {name} }}", Threads()) for name in ("", "", 'device_host: "mine"')
    )
    assert one.key_of is not None
    assert two.key_of is not None
    assert other.key_of is not None
    place = Placement("m_0")
    assert one.key_of(place) == two.key_of(place) != other.key_of(place)


def test_models_of_a_group_share_a_process() -> None:
    made = plan(CPU, Engine())
    assert made.key_of is not None
    assert (made.key_of(Placement("x")).name, made.key_of(Placement("x")).shared) == ("engines", True)


def test_models_of_a_group_share_a_process_for_each_gpu_that_sees_it_alone() -> None:
    made = plan("instance_group { kind: KIND_GPU }", Engine())
    assert made.key_of is not None
    assert made.key_of(Placement("x", "cuda:1")) == ProcessKey("engines", True, "cuda:1")
    both = Placement("x", "cuda:0", more_devices=("cuda:1",))
    assert made.key_of(both).device == "cuda:0,cuda:1"
    weights = memory_entries("m", 1, MemoryNeeds(weights_bytes=5), [both])
    assert {(entry.device, entry.num_bytes) for entry in weights} == {("cuda:0", 5), ("cuda:1", 5)}


def test_an_instance_each_where_the_backend_wants_it_and_one_for_all_elsewhere() -> None:
    apart, together = plan(CPU, Apart()), plan(CPU, Threads(), {"b": HostKind.PROCESS})
    assert apart.key_of is not None
    assert together.key_of is not None
    assert apart.key_of(Placement("a")) != apart.key_of(Placement("b"))
    assert together.key_of(Placement("a")) == together.key_of(Placement("b"))
    assert plan("instance_group { kind: KIND_GPU }", Apart()).kind is HostKind.PROCESS


@pytest.mark.parametrize(
    ("text", "backend", "said"),
    [
        (CPU, Apart(), "backend 'b' runs in processes, not in threads"),
        ("instance_group { kind: KIND_GPU }", Threads(), "the server's process uses no GPU"),
    ],
)
def test_impossible_hosts_are_refused(text: str, backend: Backend, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        plan(text + "serving { host: HOST_THREAD }", backend)


def test_workspace_is_for_each_instance_and_the_rest_for_each_device() -> None:
    placements = [Placement("a", "cuda:0"), Placement("b", "cuda:0"), Placement("c", "cuda:1")]
    entries = memory_entries("m", 1, MemoryNeeds(100, 10), placements)
    assert {(e.device, e.kind): e.num_bytes for e in entries} == {
        ("cuda:0", "weights"): 100, ("cuda:0", "workspace"): 20,
        ("cuda:1", "weights"): 100, ("cuda:1", "workspace"): 10,
    }  # fmt: skip


def test_memory_is_declared_or_not() -> None:
    assert declared_memory(parse("")) is None
    declared = declared_memory(parse("serving { memory { weights_bytes: 5 kv_bytes: 7 } }"))
    assert declared == MemoryNeeds(5, 0, 7)


def test_the_first_segment_holds_two_full_batches() -> None:
    text = (
        "max_batch_size: 8 input { dims: [3, 224, 224] data_type: TYPE_FP32 } output { dims: 9 data_type: TYPE_INT8 }"
    )
    assert first_segment_bytes(parse(text)) == 2 * 8 * 3 * 224 * 224 * 4
    assert first_segment_bytes(parse("input { dims: [1000000000] data_type: TYPE_FP64 }")) == MAX_FIRST_SEGMENT_BYTES
