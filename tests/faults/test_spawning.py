"""Workers start from the nursery, and without it; they are the server's own children and end with it."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from enginehouse.execution import spawning
from enginehouse.execution.spawning import Child, Launch, Spawner


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    made = Spawner()
    yield made
    made.close()
    assert psutil.Process().children(recursive=True) == []


def end(child: Child, channel: socket.socket) -> str:
    """Closing its channel is the word to leave."""
    channel.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child.reap()


@pytest.mark.asyncio
async def test_a_worker_is_our_child_wherever_it_comes_from(spawner: Spawner) -> None:
    slow, slow_channel = await spawner.spawn(Launch(), ["solo"])
    await spawner.prepare(Launch())
    fast, fast_channel = await spawner.spawn(Launch(), ["solo"])
    for child in (slow, fast):
        assert psutil.Process(child.pid).ppid() == os.getpid()
        assert os.getpgid(child.pid) != os.getpgid(0)
    assert [end(slow, slow_channel), end(fast, fast_channel)] == ["exited with status 0"] * 2


@pytest.mark.asyncio
async def test_the_nursery_makes_a_start_quick(spawner: Spawner) -> None:
    await spawner.prepare(Launch())
    children = [await spawner.spawn(Launch(), ["solo"]) for _ in range(20)]
    cpu_s = [sum(psutil.Process(child.pid).cpu_times()[:2]) for child, _ in children]
    assert sum(cpu_s) < 1.0  # a fresh interpreter takes 0.15 s each
    for child, channel in children:
        assert end(child, channel) == "exited with status 0"


@pytest.mark.asyncio
async def test_how_it_ended_is_told(spawner: Spawner) -> None:
    await spawner.prepare(Launch())
    child, channel = await spawner.spawn(Launch(), ["solo"])
    os.kill(child.pid, signal.SIGSEGV)
    assert end(child, channel) == "was killed by signal 11 (SIGSEGV)"


@pytest.mark.asyncio
async def test_a_dead_nursery_is_done_without(spawner: Spawner) -> None:
    await spawner.prepare(Launch())
    assert spawner._nursery is not None
    first, first_channel = await spawner.spawn(Launch(), ["solo"])
    spawner._nursery.kill()
    spawner._nursery.wait()
    second, second_channel = await spawner.spawn(Launch(), ["solo"])
    assert psutil.Process(first.pid).is_running()
    assert end(first, first_channel) == end(second, second_channel) == "exited with status 0"


@pytest.mark.asyncio
async def test_a_nursery_that_does_not_start_in_time_is_done_without(
    spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawning, "NURSERY_TIMEOUT_S", 0.0)
    for _ in range(2):
        await spawner.prepare(Launch())
        child, channel = await spawner.spawn(Launch(), ["solo"])
        assert psutil.Process().children() == [psutil.Process(child.pid)]
        assert end(child, channel) == "exited with status 0"


@pytest.mark.asyncio
async def test_a_worker_that_was_forked_too_late_has_no_part_in_the_channel(
    spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take half of the messages of the one that was started in its place."""
    forked: list[int] = []

    async def too_late(*arguments: object) -> int:
        forked.append(await Spawner._forked(*arguments))  # type: ignore[arg-type]
        raise TimeoutError

    await spawner.prepare(Launch())
    monkeypatch.setattr(spawner, "_forked", too_late)
    child, channel = await spawner.spawn(Launch(), ["solo"])
    assert forked != [child.pid]
    for late in forked:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(late).wait(timeout=5)
    assert psutil.Process(child.pid).is_running()
    assert end(child, channel) == "exited with status 0"


@pytest.mark.asyncio
async def test_a_worker_whose_number_comes_too_late_is_ended(spawner: Spawner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def too_late(nursery: socket.socket, channel: socket.socket, arguments: list[str]) -> int:
        socket.send_fds(nursery, [json.dumps(arguments).encode()], [channel.fileno()])
        await asyncio.to_thread(select.select, [nursery], [], [])
        raise TimeoutError

    await spawner.prepare(Launch())
    monkeypatch.setattr(spawner, "_forked", too_late)
    child, channel = await spawner.spawn(Launch(), ["solo"])
    assert psutil.Process().children() == [psutil.Process(child.pid)]
    assert end(child, channel) == "exited with status 0"


@pytest.mark.asyncio
async def test_variables_of_its_own_mean_an_interpreter_of_its_own(spawner: Spawner) -> None:
    launch = Launch(variables={"ONLY_HERE": "yes"})
    await spawner.prepare(launch)
    child, channel = await spawner.spawn(launch, ["solo"])
    async with asyncio.timeout(5):
        while "ONLY_HERE" not in psutil.Process(child.pid).environ():  # noqa: ASYNC110  the kernel shows it late
            await asyncio.sleep(0.01)
    assert psutil.Process(child.pid).environ()["ONLY_HERE"] == "yes"
    assert end(child, channel) == "exited with status 0"


def test_workers_end_with_the_server_even_if_they_are_stuck() -> None:
    script = """
import asyncio, os, signal, sys, time
from enginehouse.execution.spawning import Launch, Spawner
async def main():
    spawner = Spawner()
    fresh, _a = await spawner.spawn(Launch(), ["solo"])
    await spawner.prepare(Launch())
    forked, _b = await spawner.spawn(Launch(), ["solo"])
    time.sleep(0.5)
    for child in (fresh, forked):
        os.kill(child.pid, signal.SIGSTOP)
    print(fresh.pid, forked.pid, spawner._nursery.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30)
    pids = [int(word) for word in result.stdout.split()]
    assert len(pids) == 3
    give_up_at = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < give_up_at:
        time.sleep(0.02)
    assert not any(psutil.pid_exists(pid) for pid in pids)
