"""Models on one device share its process; a crash there is counted against whoever was running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest
from google.protobuf import text_format

from enginehouse.backend import LoadContext
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError, ResourceExhausted
from enginehouse.execution.contract import HostState
from enginehouse.execution.devices import CpuRuntime, SimulatedRuntime
from enginehouse.execution.hosts import HostOptions, ModelHosts
from tests.faults.hosting import BACKENDS, CONFIG, HERE, Hosted, workers_find_tests

pytestmark = pytest.mark.asyncio

GIB = 1 << 30
ON_GPU = 'backend: "tensors" serving { host: HOST_AUTO memory { weights_bytes: 1073741824 } } '


class Machine:
    """Two simulated GPUs of 4 GiB."""

    def __init__(self) -> None:
        runtimes = (CpuRuntime(), SimulatedRuntime({"simulated:0": 4 * GIB, "simulated:1": 4 * GIB}))
        self.hosts = ModelHosts(options=HostOptions(more_backends=BACKENDS), runtimes=runtimes)

    async def load(self, name: str, changes: str) -> Hosted:
        config = text_format.Merge(f'name: "{name}" {ON_GPU} {changes}', text_format.Parse(CONFIG, ModelConfig()))
        healths: list[object] = []
        model = await self.hosts.load(LoadContext(config, 1, HERE), healths.append)
        return Hosted(model, self.hosts, healths)  # type: ignore[arg-type]  # only their number matters here


@asynccontextmanager
async def machine() -> AsyncIterator[Machine]:
    workers_find_tests()
    made = Machine()
    try:
        yield made
    finally:
        await made.hosts.close()
    assert psutil.Process().children(recursive=True) == []
    assert made.hosts.ledger.entries() == []


def on(*gpus: int, count: int = 1) -> str:
    return f"instance_group {{ kind: KIND_GPU count: {count} gpus: {list(gpus)} }}"


async def test_models_on_a_gpu_share_its_process() -> None:
    async with machine() as gpus:
        a, b, c = await gpus.load("a", on(0)), await gpus.load("b", on(0, count=2)), await gpus.load("c", on(1))
        assert await a.pid() == await b.pid() == await b.pid(instance=1)
        assert await c.pid() != await a.pid()
        assert [instance.device for instance in b.model.instances] == ["simulated:0"] * 2


async def test_models_that_are_loaded_at_once_start_one_process() -> None:
    async with machine() as gpus:
        in_one = "serving { host: HOST_DEVICE } instance_group { kind: KIND_CPU }"
        loaded = await asyncio.gather(*(gpus.load(name, in_one) for name in "abcd"))
        assert len({await each.pid() for each in loaded}) == 1
        assert len(psutil.Process().children()) == 2  # and the nursery


async def test_a_model_on_two_gpus_has_an_instance_in_each_process() -> None:
    async with machine() as gpus:
        both = await gpus.load("both", on(0, 1))
        single = await gpus.load("single", on(1))
        pids = [await both.pid(instance=index) for index in range(2)]
        assert pids[0] != pids[1]
        assert await single.pid() == pids[1]


async def test_the_process_ends_with_its_last_model_and_not_before() -> None:
    async with machine() as gpus:
        a, b = await gpus.load("a", on(0)), await gpus.load("b", on(0))
        pid = await a.pid()
        await a.model.close()
        assert await b.pid() == pid
        await b.model.close()
        assert not psutil.pid_exists(pid)
        assert await (await gpus.load("c", on(0))).pid() != pid


async def test_a_crash_is_counted_against_the_model_that_ran() -> None:
    limits = "serving { supervision { max_restarts: 1 } }"
    async with machine() as gpus:
        guilty, bystander = await gpus.load("guilty", on(0) + limits), await gpus.load("bystander", on(0) + limits)
        for _ in range(2):
            await asyncio.gather(guilty.until_ready(), bystander.until_ready())
            assert "was killed by signal 11" in next(iter((await guilty.run(-2)).texts()))
            assert bystander.state is HostState.RESTARTING
        assert guilty.state is HostState.FAILED
        await bystander.until_ready()
        assert (bystander.model.health.num_restarts, bystander.state) == (0, HostState.READY)
        assert (await bystander.run(3)).values() == [[6, 6]]


async def test_a_model_that_dies_while_loading_leaves_its_neighbours_blameless() -> None:
    async with machine() as gpus:
        a = await gpus.load("a", on(0))
        with pytest.raises(EnginehouseError, match="exited with status 7"):
            await gpus.load("b", on(0) + 'parameters { key: "die_in_load" value { string_value: "1" } }')
        await a.until_ready()
        assert a.model.health.num_restarts == 0
        assert (await a.run(3)).values() == [[6, 6]]


async def test_a_load_that_does_not_fit_is_refused_with_the_numbers() -> None:
    async with machine() as gpus:
        await gpus.load("a", on(0) + "serving { memory { weights_bytes: 3221225472 } }")
        with pytest.raises(ResourceExhausted) as refusal:
            await gpus.load("b", on(0) + "serving { memory { weights_bytes: 2147483648 } }")
        assert str(refusal.value) == (
            "model 'b' needs 2.00 GiB on simulated:0, 1.00 GiB of 4.00 GiB are free (held by a 3.00 GiB)"
        )
        await gpus.load("b", on(1) + "serving { memory { weights_bytes: 2147483648 } }")


async def test_an_unloaded_models_bytes_are_free_again() -> None:
    async with machine() as gpus:
        for _ in range(3):
            model = await gpus.load("a", on(0) + "serving { memory { weights_bytes: 3221225472 } }")
            await model.model.close()
        assert gpus.hosts.ledger.free_bytes("simulated:0") == 4 * GIB


async def test_instances_move_between_gpus_in_place() -> None:
    async with machine() as gpus:
        from enginehouse.backend import Placement

        a = await gpus.load("a", on(0))
        pid = await a.pid()
        await a.model.set_instances([Placement("a_0_0", "simulated:0"), Placement("a_0_1", "simulated:1")])
        assert [await a.pid(instance=0), len({await a.pid(instance=i) for i in range(2)})] == [pid, 2]
        await a.model.set_instances([Placement("a_0_1", "simulated:1")])
        assert not psutil.pid_exists(pid)
        assert (await a.run(2)).values() == [[4, 4]]


async def test_a_gpu_that_is_fuller_than_its_limit_takes_no_further_model() -> None:
    workers_find_tests()
    simulated = SimulatedRuntime({"simulated:0": 4 * GIB}, used={"simulated:0": 3 * GIB})
    options = HostOptions(more_backends=BACKENDS, gpu_load_limits={0: 0.7})
    hosts = ModelHosts(options=options, runtimes=(CpuRuntime(), simulated))
    config = text_format.Merge(f"{ON_GPU} {on(0)}", text_format.Parse(CONFIG, ModelConfig()))
    with pytest.raises(ResourceExhausted, match=r"75% of its memory are used, --model-load-gpu-limit allows 70%"):
        await hosts.load(LoadContext(config, 1, HERE), lambda health: None)
    simulated.used["simulated:0"] = 2 * GIB
    model = await hosts.load(LoadContext(config, 1, HERE), lambda health: None)
    await model.close()
    await hosts.close()
