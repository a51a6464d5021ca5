"""What goes wrong in a worker stays there: its requests are answered at once, it comes back, others go on."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import numpy as np
import pytest

from enginehouse.backend import Placement
from enginehouse.errors import EnginehouseError, FailureReason, InvalidArgument, Unavailable
from enginehouse.execution.contract import HostState
from enginehouse.execution.hosts import HostOptions
from tests.faults.hosting import BACKENDS, child_pids, hosted, request_of

pytestmark = pytest.mark.asyncio

KINDS = pytest.mark.parametrize("backend", ["requests", "tensors"])


@KINDS
async def test_a_batch_comes_back_by_rows(backend: str) -> None:
    async with hosted(f'backend: "{backend}"') as host:
        answered = await host.run(1, 2, 3)
        assert answered.values() == [[2, 2], [4, 4], [6, 6]]
        assert answered.values("PID")[0][0] != os.getpid()


@KINDS
async def test_instances_run_side_by_side(backend: str) -> None:
    async with hosted(f'backend: "{backend}" instance_group {{ count: 2 kind: KIND_CPU }}') as host:
        both = await asyncio.gather(host.run(1, instance=0), host.run(2, instance=1))
        assert [answered.values() for answered in both] == [[[2, 2]], [[4, 4]]]
        pids = {answered.values("PID")[0][0] for answered in both}
        assert len(pids) == (2 if backend == "requests" else 1)


@KINDS
async def test_an_exception_fails_the_batch_and_nothing_else(backend: str) -> None:
    async with hosted(f'backend: "{backend}"') as host:
        pid = await host.pid()
        answered = await host.run(-1, 2)
        assert answered.texts() == {"told to fail"}
        assert isinstance(answered.error, EnginehouseError)
        assert await host.pid() == pid


@KINDS
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (-2, "was killed by signal 11 (SIGSEGV)"),
        (-3, "was killed by signal 9 (SIGKILL)"),
        (-5, "exited with status 3"),
    ],
)
async def test_a_crash_fails_its_requests_at_once_and_the_model_comes_back(backend: str, how: int, said: str) -> None:
    async with hosted(f'backend: "{backend}"') as host:
        started = time.monotonic()
        answered = await host.run(how, 2)
        assert time.monotonic() - started < 5
        [text] = answered.texts()
        assert said in text
        assert "while it ran this request" in text
        assert isinstance(answered.error, Unavailable)
        assert answered.error.reason is FailureReason.BACKEND
        assert host.state is HostState.RESTARTING
        await host.until_ready()
        assert (await host.run(4)).values() == [[8, 8]]
        assert host.model.health.num_restarts == 1
        assert [health.state for health in host.healths] == [HostState.RESTARTING, HostState.READY]


async def test_killed_from_outside_in_the_middle_of_a_batch() -> None:
    async with hosted() as host:
        pid = await host.pid()
        running = asyncio.create_task(host.run(-4, 2))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        assert "SIGKILL" in next(iter((await running).texts()))
        await host.until_ready()
        assert await host.pid() != pid


async def test_killed_while_idle_counts_and_comes_back() -> None:
    async with hosted() as host:
        os.kill(await host.pid(), signal.SIGKILL)
        await host.until(lambda: bool(host.healths))
        await host.until_ready()
        assert (await host.run(1)).values() == [[2, 2]]


async def test_one_instance_crashing_leaves_the_other_and_the_model_ready() -> None:
    async with hosted("instance_group { count: 2 kind: KIND_CPU }") as host:
        crashing = asyncio.create_task(host.run(-2, instance=0))
        other = await host.run(5, instance=1)
        assert other.values() == [[10, 10]]
        await crashing
        assert host.state is HostState.READY
        assert [instance.available for instance in host.model.instances] == [False, True]
        assert len(host.healths) == 1  # the availability changed
        await host.until_ready()


async def test_after_too_many_crashes_the_model_gives_up_and_says_why() -> None:
    async with hosted("serving { supervision { max_restarts: 2 window_s: 60 } }") as host:
        for _ in range(3):
            await host.until_ready()
            await host.run(-5)
        assert host.state is HostState.FAILED
        assert host.model.health.reason == "gave up after 3 crashes within 60 s; the last: exited with status 3"
        await host.until(lambda: not host.hosts.ledger.entries())
        assert list(host.model.instances) == []


async def test_a_stuck_batch_is_ended_at_its_time_limit() -> None:
    async with hosted("serving { supervision { hang_timeout_s: 0.5 } }") as host:
        answered = await host.run(-4)
        assert "made no progress for" in next(iter(answered.texts()))
        await host.until_ready()


async def test_a_stopped_process_is_ended() -> None:
    async with hosted() as host:
        host.model.policy = type(host.model.policy)(stopped_timeout_s=0.5)  # type: ignore[attr-defined]
        os.kill(await host.pid(), signal.SIGSTOP)
        assert "was stopped (SIGSTOP)" in next(iter((await host.run(1)).texts()))
        await host.until_ready()


async def test_a_model_that_fills_memory_is_ended_at_its_limit() -> None:
    async with hosted("serving { memory { host_limit_bytes: 300000000 } }") as host:
        answered = await host.run(-6)
        assert "of memory, its limit is 286.1 MiB" in next(iter(answered.texts()))
        await host.until_ready()
        assert (await host.run(1)).values() == [[2, 2]]


async def test_a_model_that_dies_while_it_loads_is_an_error_of_the_load() -> None:
    with pytest.raises(Unavailable, match=r"the process of model 'm' exited with status 7"):
        async with hosted('backend: "tensors" parameters { key: "die_in_load" value { string_value: "1" } }'):
            pass


async def test_a_failing_instance_leaves_no_process_behind() -> None:
    with pytest.raises(EnginehouseError, match="unlucky instance"):
        async with hosted("instance_group { count: 14 kind: KIND_CPU name: 'm' }"):
            pass


@KINDS
async def test_large_and_growing_inputs_get_larger_segments(backend: str) -> None:
    async with hosted(f'backend: "{backend}"') as host:
        for columns in (10, 1_000_000, 20, 3_000_000):
            answered = await host.run_requests([request_of(1, columns), request_of(3, columns)])
            first, second = answered.values()
            assert (len(first), set(first), len(second), set(second)) == (columns, {2}, columns, {6})


async def test_many_batches_at_once_share_the_slab() -> None:
    async with hosted('backend: "tensors"') as host:
        batches = await asyncio.gather(*(host.run_requests([request_of(n, 30_000)]) for n in range(1, 60)))
        assert [set(answered.values()[0]) for answered in batches] == [{2 * n} for n in range(1, 60)]


async def test_an_input_that_the_model_keeps_is_not_overwritten() -> None:
    async with hosted('backend: "tensors"') as host:
        await host.run(1000)
        for _ in range(50):
            await host.run(7)
        assert (await host.run(1001)).values() == [[2000, 2000]]


async def test_answers_that_are_kept_stay_what_they_were() -> None:
    async with hosted('backend: "tensors"') as host:
        kept = [await host.run(n) for n in range(1, 100)]
        assert [answered.values()[0][0] for answered in kept] == [2 * n for n in range(1, 100)]


async def test_cancelling_reaches_a_running_model() -> None:
    async with hosted() as host:
        request = request_of(77)
        running = asyncio.create_task(host.run_requests([request]))
        await asyncio.sleep(0.05)
        assert not running.done()
        host.model.instances[0].cancel(request)
        assert (await running).values() == [[154, 154]]


async def test_instances_change_in_place() -> None:
    async with hosted("instance_group { count: 2 kind: KIND_CPU name: 'g' }") as host:
        kept = await host.pid(instance=0)
        await host.model.set_instances([Placement("g_0"), Placement("g_5"), Placement("g_6")])
        assert [instance.name for instance in host.model.instances] == ["g_0", "g_5", "g_6"]
        assert await host.pid(instance=0) == kept
        assert len({await host.pid(instance=index) for index in range(3)}) == 3


@pytest.mark.parametrize("backend", ["requests", "tensors"])
async def test_instances_that_can_not_all_be_made_leave_those_that_were_there(backend: str) -> None:
    config = f"backend: '{backend}' instance_group {{ count: 1 kind: KIND_CPU name: 'g' }}"
    async with hosted(config) as host:
        processes = child_pids()
        with pytest.raises(InvalidArgument, match="unlucky"):
            await host.model.set_instances([Placement("g_0"), Placement("g_5"), Placement("g_13")])
        assert [instance.name for instance in host.model.instances] == ["g_0"]
        assert (await host.run(1)).values() == [[2, 2]]
        await host.until(lambda: child_pids() == processes)


async def test_a_process_that_ends_while_it_is_loaded_again_starts_once_more() -> None:
    slow = "backend: 'tensors' parameters { key: 'load_s' value { string_value: '0.5' } }"
    async with hosted(slow) as host:
        pid, known = await host.pid(), child_pids()
        os.kill(pid, signal.SIGKILL)
        await host.until(lambda: bool(child_pids() - known))
        [loading] = child_pids() - known
        os.kill(loading, signal.SIGKILL)
        await host.until_ready()
        assert await host.pid() not in (pid, loading)


async def test_an_instance_that_complains_when_it_is_closed_goes_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with hosted("backend: 'tensors' instance_group { count: 1 kind: KIND_CPU name: 'g' }") as host:
        await host.model.set_instances([Placement("g_0"), Placement("g_14")])
        await host.model.set_instances([Placement("g_0")])
        assert [instance.name for instance in host.model.instances] == ["g_0"]
        assert (await host.run(1)).values() == [[2, 2]]
    assert "did not close cleanly: RuntimeError: not yet" in caplog.text


async def test_every_request_is_answered_whatever_happens_to_the_worker() -> None:
    sent = answered = 0
    generator = np.random.default_rng(7)
    async with hosted("serving { supervision { max_restarts: 1000 backoff_max_s: 0.01 } }") as host:
        for _ in range(30):
            values = [
                int(v)
                for v in generator.choice([1, 2, 3, -1, -2, -3, -5], 4, p=[0.3, 0.3, 0.2, 0.08, 0.04, 0.04, 0.04])
            ]
            results = await asyncio.gather(*(host.run(value, 9) for value in values))
            sent += 2 * len(values)
            answered += sum(len(r.responses) for r in results if all(a[-1].final for a in r.responses.values()))
            await host.until_ready()
        assert sent == 240
        # `run` returns only when each request has exactly one final answer.
        assert answered == sent
        assert (await host.run(1)).values() == [[2, 2]]


@KINDS
async def test_a_host_policy_keeps_instances_on_their_cores(backend: str) -> None:
    core = min(os.sched_getaffinity(0))
    options = HostOptions(more_backends=BACKENDS, host_policies={"one": {"cpu-cores": str(core)}})
    groups = "instance_group [{ kind: KIND_CPU count: 2 host_policy: 'one' }, { kind: KIND_CPU }]"
    async with hosted(f'backend: "{backend}" {groups}', options) as host:
        pid = await host.pid(instance=0)
        threads = {thread: os.sched_getaffinity(thread) for thread in map(int, os.listdir(f"/proc/{pid}/task"))}
        assert {core} in threads.values()
        assert os.sched_getaffinity(0) != {core} or len(os.sched_getaffinity(0)) == 1
