"""Looks at every worker a few times a second and ends those that hang or eat memory.

`supervision` decides; here are the readings: /proc, and the progress words that workers write into their slab.
"""

from __future__ import annotations

import asyncio
import time

import psutil

from enginehouse.execution.process_host import HostProcess
from enginehouse.execution.supervision import SupervisionPolicy, WorkerFacts, reason_to_kill

TICK_S = 0.25
IDLE_S = 10.0
"""A worker that has had nothing to do for so long gives the pages of grown slabs back."""
PAGE_BYTES = 4096


class Supervisor:
    """One per server; its task runs while there are processes to look at."""

    def __init__(self) -> None:
        self._processes: set[HostProcess] = set()
        self._task: asyncio.Task[None] | None = None

    def watch(self, process: HostProcess) -> None:
        self._processes.add(process)
        process.when_closing(self._processes.discard)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._look_around(), name="supervise workers")

    async def _look_around(self) -> None:
        while self._processes:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            for process in list(self._processes):
                self.look_at(process, now_s)

    def look_at(self, process: HostProcess, now_s: float) -> None:
        """Ends the process if it must go."""
        worker = process.worker
        if worker is None or not worker.alive:
            process.stopped_since_s = None
            return
        if now_s - worker.last_used_ns / 1e9 > IDLE_S:
            worker.trim()
        for tenant in process.tenants:
            reason = reason_to_kill(read_facts(process, tenant.model.policy, now_s), tenant.model.policy, now_s)
            if reason:
                worker.kill(reason)
                return

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


def read_facts(process: HostProcess, policy: SupervisionPolicy, now_s: float) -> WorkerFacts:
    """Reads no more than the policy and the moment ask for: there may be a thousand workers."""
    worker = process.worker
    assert worker is not None, "looked at a process without a worker: a bug"
    since_s = worker.busy_since_s()
    if since_s is not None and is_stopped(worker.pid):
        process.stopped_since_s = process.stopped_since_s or now_s
    else:
        process.stopped_since_s = None
    memory_bytes = resident_bytes(worker.pid) if policy.host_limit_bytes else 0
    return WorkerFacts(since_s, process.stopped_since_s, memory_bytes)


def is_stopped(pid: int) -> bool:
    """Whether the kernel shows it as stopped or traced."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False


def own_bytes(pid: int) -> int:
    """What goes with the process: pages that nobody else has."""
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0


def resident_bytes(pid: int) -> int:
    """Memory of its own; what it shares with others (the slabs, libraries) isn't counted."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            fields = file.read().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * PAGE_BYTES
