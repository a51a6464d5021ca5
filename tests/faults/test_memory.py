"""Unloading gives everything back; running out of shared memory fails a request, not a process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from google.protobuf import text_format

from enginehouse.backend import LoadContext
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import ResourceExhausted
from enginehouse.execution import slab
from enginehouse.execution.hosts import HostOptions, ModelHosts
from tests.faults.hosting import BACKENDS, CONFIG, HERE, Hosted, hosted, request_of, workers_find_tests

MIB = 1 << 20


def tree_bytes() -> int:
    """Memory of this process and all that it started, shared pages counted once."""
    own = psutil.Process()
    total = 0
    for member in (own, *own.children(recursive=True)):
        try:
            total += int(member.memory_full_info().pss)
        except psutil.NoSuchProcess:
            continue
    return total


async def load_and_unload(hosts: ModelHosts, changes: str) -> None:
    config = text_format.Merge(changes, text_format.Parse(CONFIG, ModelConfig()))
    model = await hosts.load(LoadContext(config, 1, HERE), lambda health: None)
    answered = await Hosted(model, hosts, []).run_requests([request_of(4, 50_000)])
    assert answered.values()[0][0] == 8
    await model.close()


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["HOST_PROCESS", "HOST_THREAD"])
async def test_memory_is_level_after_200_loads_and_unloads(kind: str) -> None:
    workers_find_tests()
    hosts = ModelHosts(options=HostOptions(more_backends=BACKENDS))
    changes = f'backend: "tensors" serving {{ host: {kind} }}'
    for _ in range(20):
        await load_and_unload(hosts, changes)
    gc.collect()
    before, descriptors = tree_bytes(), psutil.Process().num_fds()
    for _ in range(200):
        await load_and_unload(hosts, changes)
    gc.collect()
    grown = tree_bytes() - before
    assert grown < 4 * MIB  # 20 KiB a load would be a leak; the allocator's own ups and downs are less
    assert psutil.Process().num_fds() == descriptors
    await hosts.close()


@pytest.mark.asyncio
async def test_grown_slabs_give_their_pages_back_when_idle() -> None:
    async with hosted('backend: "tensors"') as host:
        await host.run_requests([request_of(1, 8_000_000)])
        worker = host.model.instances[0].worker  # type: ignore[attr-defined]
        full = memfd_bytes(worker.pid)
        assert full > 60 * MIB
        worker.trim()
        await host.until(lambda: memfd_bytes(worker.pid) < MIB)
        assert (await host.run_requests([request_of(3, 8_000_000)])).values()[0][-1] == 6


def memfd_bytes(pid: int) -> int:
    """Of the segments that the process maps."""
    kib, is_segment = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_segment = "memfd:enginehouse" in line
        elif is_segment and line.startswith("Rss:"):
            kib += int(line.split()[1])
    return kib * 1024


@pytest.mark.asyncio
async def test_growth_beyond_the_memory_limit_is_refused_with_the_numbers() -> None:
    options = HostOptions(more_backends=BACKENDS, memory_limits={"cpu": 64 * MIB})
    async with hosted("", options) as host:
        answered = await host.run_requests([request_of(1, 20_000_000)])
        assert "needs 128.0 MiB on cpu" in str(answered.error)
        assert "of 64.0 MiB are free" in str(answered.error)
        assert (await host.run_requests([request_of(1, 1_000_000)])).values()[0][0] == 2
        kinds = {entry.kind: entry.num_bytes for entry in host.hosts.ledger.entries("m")}
        assert kinds["workspace"] >= 4 * MIB
        assert kinds["weights"] > 0


@pytest.mark.asyncio
async def test_no_memory_for_an_input_fails_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosted() as host:
        pid = await host.pid()

        def refuse(name: str, nbytes: int) -> int:
            raise OSError(12, "Cannot allocate memory")

        with monkeypatch.context() as patched:
            patched.setattr(slab, "make_segment", refuse)
            answered = await host.run_requests([request_of(1, 1_000_000)])
        assert isinstance(answered.error, ResourceExhausted)
        assert "no memory for 4000000 bytes of input" in str(answered.error)
        assert (await host.run(5)).values() == [[10, 10]]
        assert (await host.run_requests([request_of(1, 1_000_000)])).values()[0][0] == 2
        assert await host.pid() == pid


@pytest.mark.asyncio
async def test_the_ledger_forgets_growth_that_failed_or_ended_with_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, nbytes: int) -> int:
        raise OSError(12, "Cannot allocate memory")

    async with hosted() as host:
        ledger = host.hosts.ledger
        at_start = ledger.booked_bytes("cpu")
        with monkeypatch.context() as patched:
            patched.setattr(slab, "make_segment", refuse)
            assert (await host.run_requests([request_of(1, 1_000_000)])).error is not None
        assert ledger.booked_bytes("cpu") == at_start
        assert (await host.run_requests([request_of(1, 1_000_000)])).error is None
        assert ledger.booked_bytes("cpu") >= at_start + 4 * MIB
        os.kill(await host.pid(), signal.SIGKILL)
        await host.until(lambda: not host.model.instances[0].available)
        await host.until_ready()
        assert ledger.booked_bytes("cpu") == at_start


@pytest.mark.asyncio
async def test_no_memory_for_an_output_fails_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosted('backend: "tensors"') as host:
        await host.run_requests([request_of(1, 1_000_000)])  # the input's segment is there now
        kept = [await host.run_requests([request_of(1, 900_000)]) for _ in range(1)]
        make = slab.make_segment

        def refuse_outputs(name: str, nbytes: int) -> int:
            if "outputs" in name:
                raise OSError(12, "Cannot allocate memory")
            return make(name, nbytes)

        with monkeypatch.context() as patched:
            patched.setattr(slab, "make_segment", refuse_outputs)
            failed = await host.run_requests([request_of(1, 3_000_000)])
        assert "no memory for" in str(failed.error)
        assert "bytes of output" in str(failed.error)
        assert (await host.run(5)).values() == [[10, 10]]
        assert kept[0].values()[0][0] == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a mount of its own")
def test_a_full_dev_shm_does_not_matter() -> None:
    """Segments are memfds: the size of /dev/shm, 64 MiB in most containers, is no limit for them."""
    script = """
import asyncio, os
from tests.faults.hosting import hosted, request_of
with open("/dev/shm/full", "wb") as file:
    try:
        while True:
            file.write(bytes(1 << 20)); file.flush()
    except OSError as problem:
        print(problem.strerror)
async def main():
    async with hosted('backend: "tensors"') as host:
        print((await host.run_requests([request_of(3, 5_000_000)])).values()[0][-1])
asyncio.run(main())
"""
    command = f"mount -t tmpfs -o size=2m tmpfs /dev/shm && exec {sys.executable} -"
    root = Path(__file__).parents[2]
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command],
        input=script, capture_output=True, text=True, check=False, cwd=root, timeout=60,
    )  # fmt: skip
    if "Operation not permitted" in result.stderr:
        pytest.skip("no mount namespaces here")
    assert result.stdout.split("\n")[:2] == ["No space left on device", "6"], result.stderr
