"""Warm-up runs the config's samples on every instance before the version is ready."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import Internal, InvalidArgument
from enginehouse.execution.contract import Batch
from enginehouse.request_checks import RequestChecks
from enginehouse.scheduling.warmup import random_tensor, warm_up, warmup_requests
from enginehouse.testing.instances import GatedInstance
from enginehouse.types import VALID_TYPES, DataType

from .factories import Observer, config_of

ONE_INPUT = """name: "m" max_batch_size: 4
    input { name: "X" data_type: TYPE_FP32 dims: [3] } output { name: "X" data_type: TYPE_FP32 dims: [3] }"""


def warming(samples: str, base: str = ONE_INPUT) -> ModelConfig:
    return config_of(f"{base} {samples}")


def sample(data: str, batch_size: int = 1, count: int = 0, datatype: str = "TYPE_FP32", dims: str = "3") -> str:
    return f"""model_warmup {{ name: "s" batch_size: {batch_size} count: {count}
        inputs {{ key: "X" value {{ data_type: {datatype} dims: [{dims}] {data} }} }} }}"""


class EagerInstance(GatedInstance):
    """Runs each batch soon after it came."""

    def execute(self, batch: Batch) -> None:
        super().execute(batch)
        asyncio.get_running_loop().call_soon(self.step)


async def warm(config: ModelConfig, directory: Path, num_instances: int = 1) -> tuple[list[GatedInstance], Observer]:
    instances: list[GatedInstance] = [EagerInstance(name=f"m_{index}") for index in range(num_instances)]
    observer = Observer()
    await warm_up(config, directory, instances, observer, RequestChecks(config).check)
    return instances, observer


@pytest.mark.asyncio
async def test_a_batch_is_that_many_requests_of_one_row_and_runs_count_times(tmp_path: Path) -> None:
    config = warming(sample("zero_data: true", batch_size=2) + sample("random_data: true", count=2))
    (instance,), observer = await warm(config, tmp_path)
    assert instance.sizes == [2, 1, 1]
    assert [request.inputs["X"].shape for request in observer.batches[0]] == [(1, 3), (1, 3)]
    assert not observer.batches[0][0].inputs["X"].numpy().any()
    assert observer.batches[1][0].inputs["X"].numpy().any()


@pytest.mark.asyncio
async def test_every_instance_is_warmed(tmp_path: Path) -> None:
    instances, _ = await warm(warming(sample("zero_data: true")), tmp_path, num_instances=2)
    assert [instance.sizes for instance in instances] == [[1], [1]]


@pytest.mark.asyncio
async def test_a_sample_without_batch_size_runs_nothing(tmp_path: Path) -> None:
    (instance,), _ = await warm(warming(sample("zero_data: true", batch_size=0)), tmp_path)
    assert instance.sizes == []


@pytest.mark.asyncio
async def test_file_data_comes_from_the_warmup_folder(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "x").write_bytes(np.array([1, 2, 3, 4], np.float32).tobytes())
    _, observer = await warm(warming(sample('input_data_file: "x"')), tmp_path)
    assert observer.batches[0][0].inputs["X"].numpy().tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (sample('input_data_file: "none"'), "failed to open text file for read .*none: "),
        (sample('input_data_file: "short"'), "expects 12 bytes, but the data provided from shortonly has 4 bytes"),
        (sample("zero_data: true", dims="-1"), "expects all variable-size dimensions are specified for input 'X'"),
        (sample("zero_data: true", batch_size=5), r"sample 's': batch size 5 for 'm', max allowed is 4"),
        (sample(""), "to have input_data_type set"),
        ('model_warmup { name: "s" batch_size: 1 }', r"^\[request id: <id_unknown>\] expected 1 inputs but got 0"),
        (sample("zero_data: true", dims="5"), "unexpected shape for input 'X'"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(samples: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "short").write_bytes(bytes(4))
    config = warming(samples)
    with pytest.raises((InvalidArgument, Internal), match=message):
        warmup_requests(config, config.model_warmup[0], tmp_path, RequestChecks(config).check)


@pytest.mark.asyncio
async def test_an_error_of_the_model_fails_the_load_once_every_instance_is_done(tmp_path: Path) -> None:
    def fail(inputs: object) -> dict[str, object]:
        raise InvalidArgument("no good")

    bad, good = EagerInstance(fail), EagerInstance()  # type: ignore[arg-type]  # never returns
    config = warming(sample("zero_data: true", batch_size=2, count=2))
    with pytest.raises(InvalidArgument, match=r"^failed to run warmup sample 's': no good; no good; $"):
        await warm_up(config, tmp_path, [bad, good], Observer(), RequestChecks(config).check)
    assert (bad.sizes, good.sizes) == ([2], [2, 2])


def test_sequence_models_get_their_controls_and_states(tmp_path: Path) -> None:
    sequences = """sequence_batching { direct {}
        control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }
        state { input_name: "S_IN" output_name: "S_OUT" data_type: TYPE_INT32 dims: [2] } }"""
    config = warming(sample("zero_data: true") + sequences)
    [request] = warmup_requests(config, config.model_warmup[0], tmp_path, RequestChecks(config).check)
    assert request.inputs["START"].numpy().item() == 1
    assert request.inputs["S_IN"].shape == (1, 2)


def test_a_sample_may_set_the_controls_of_a_sequence_itself(tmp_path: Path) -> None:
    sequences = """sequence_batching { direct {}
        control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } } }
        model_warmup { name: "s" batch_size: 1
            inputs { key: "X" value { data_type: TYPE_FP32 dims: [3] zero_data: true } }
            inputs { key: "START" value { data_type: TYPE_INT32 dims: [1] zero_data: true } } }"""
    config = warming(sequences)
    [request] = warmup_requests(config, config.model_warmup[0], tmp_path, RequestChecks(config).check)
    assert request.inputs["START"].numpy().tolist() == [[0]]


@pytest.mark.parametrize("datatype", VALID_TYPES)
def test_random_values_fill_the_shape_in_every_type(datatype: DataType) -> None:
    tensor = random_tensor("X", datatype, (2, 3))
    assert tensor.datatype is datatype
    assert tensor.numpy().shape == (2, 3)
