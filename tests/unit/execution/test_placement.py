"""Instance groups become instances on devices, with Triton's names and refusals."""

from __future__ import annotations

import pytest
from google.protobuf import text_format

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.execution.placement import Machine, placements, with_explicit_groups

CPU_ONLY = Machine()
TWO_GPUS = Machine(["cuda:0", "cuda:1"])


def place(text: str, machine: Machine) -> list[tuple[str, str, int]]:
    config = text_format.Parse(f'name: "m" {text}', ModelConfig())
    return [(p.name, p.device, p.group) for p in placements(with_explicit_groups(config, machine), machine)]


def test_no_group_is_one_instance_named_after_the_model() -> None:
    assert place("", CPU_ONLY) == [("m_0", "cpu", 0)]


def test_groups_are_numbered_and_so_are_their_instances() -> None:
    text = "instance_group [{ kind: KIND_CPU count: 2 }, { name: 'big' kind: KIND_CPU }]"
    assert place(text, CPU_ONLY) == [("m_0_0", "cpu", 0), ("m_0_1", "cpu", 0), ("big_0", "cpu", 1)]


def test_auto_takes_every_gpu_where_there_are_some() -> None:
    assert place("instance_group [{ count: 1 }]", TWO_GPUS) == [
        ("m_0_0", "cuda:0", 0),
        ("m_0_1", "cuda:1", 0),
    ]
    assert place("instance_group [{ count: 1 }]", CPU_ONLY) == [("m_0_0", "cpu", 0)]


def test_count_is_for_each_gpu() -> None:
    text = "instance_group [{ kind: KIND_GPU count: 2 gpus: [1, 0] }]"
    assert [device for _, device, _ in place(text, TWO_GPUS)] == ["cuda:1", "cuda:1", "cuda:0", "cuda:0"]


def test_negative_count_is_one() -> None:
    assert len(place("instance_group [{ kind: KIND_CPU count: -3 }]", CPU_ONLY)) == 1


def test_kind_model_leaves_the_device_to_the_backend() -> None:
    assert place("instance_group [{ kind: KIND_MODEL }]", TWO_GPUS) == [("m_0_0", "model", 0)]


@pytest.mark.parametrize(
    ("text", "machine", "message"),
    [
        ("kind: KIND_CPU gpus: [0]", CPU_ONLY, "has kind KIND_CPU but specifies one or more GPUs"),
        ("kind: KIND_GPU", CPU_ONLY, "has kind KIND_GPU but no GPUs are available"),
        (
            "kind: KIND_GPU gpus: [2]",
            TWO_GPUS,
            "specifies invalid or unsupported gpu id 2. GPUs on this machine: 0, 1",
        ),
    ],
)
def test_impossible_groups_are_refused(text: str, machine: Machine, message: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        place(f"instance_group [{{ {text} }}]", machine)
    assert str(refusal.value) == f"instance group m_0 of model m {message}"


def test_missing_gpu_may_fall_back_to_the_cpu() -> None:
    text = "instance_group [{ kind: KIND_GPU gpus: [0] }]"
    assert place(text, Machine(cpu_for_missing_gpu=True)) == [("m_0_0", "cpu", 0)]


def test_explicit_groups_stay_as_they_are() -> None:
    config = text_format.Parse('name: "m" instance_group [{ count: 2 }]', ModelConfig())
    once = with_explicit_groups(config, TWO_GPUS)
    assert with_explicit_groups(once, TWO_GPUS) == once


LLM = 'backend: "llm" '


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("", [("cuda:1",)]),
        ("serving { llm { tensor_parallel_size: 2 } }", [("cuda:1", "cuda:2")]),
        ("instance_group [{ kind: KIND_GPU gpus: [0] }]", [("cuda:0",)]),
        ("instance_group [{ kind: KIND_CPU }] serving { llm { tensor_parallel_size: 2 } }", [("cpu",)]),
    ],
)
def test_an_llm_has_one_instance_on_the_emptiest_gpus(text: str, devices: list[tuple[str, ...]]) -> None:
    machine = Machine(["cuda:0", "cuda:1", "cuda:2"], free_by_gpu={"cuda:0": 1, "cuda:1": 9, "cuda:2": 3})
    config = text_format.Parse(f'name: "m" {LLM} {text}', ModelConfig())
    placed = placements(with_explicit_groups(config, machine), machine)
    assert [(placement.device, *placement.more_devices) for placement in placed] == devices


def test_an_llms_gpus_stay_open_until_it_is_known_how_full_they_are() -> None:
    config = text_format.Parse(f'name: "m" {LLM}', ModelConfig())
    assert list(with_explicit_groups(config, TWO_GPUS).instance_group[0].gpus) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "can have 2 GPUs, and tensor_parallel_size asks for 3"),
        ("instance_group [{ gpus: [0] }]", "lists 1 GPUs, and tensor_parallel_size asks for 3"),
    ],
)
def test_an_llm_that_spans_more_gpus_than_there_are_is_refused(text: str, told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        place(f"{LLM} {text} serving {{ llm {{ tensor_parallel_size: 3 }} }}", TWO_GPUS)


def test_host_policies_give_instances_their_cores() -> None:
    machine = Machine(["cuda:0"], cores_by_policy={"cpu": (0,), "gpu_0": (1, 2), "mine": (3,)})
    text = "instance_group [{ kind: KIND_CPU }, { kind: KIND_GPU }, { kind: KIND_CPU host_policy: 'mine' }]"
    config = text_format.Parse(f'name: "m" {text}', ModelConfig())
    placed = placements(with_explicit_groups(config, machine), machine)
    assert [placement.cpu_cores for placement in placed] == [(0,), (1, 2), (3,)]
