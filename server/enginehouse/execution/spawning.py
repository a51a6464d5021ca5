"""Starts workers and tells how they ended.

Never a fork of the server: it has threads. A worker with an environment of its own is a fresh interpreter;
the others come from the nursery. Each leads a process group, so that what it starts can be ended with it, and
a terminal's Ctrl-C reaches the server alone.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from enginehouse.execution.nursery import PID, READY

PACKAGE_ROOTS = [str(Path(__file__).parents[2])]
_PATH_VARIABLE = "ENGINEHOUSE_WORKER_PATH"
# In another environment the server's packages come after its own: they fill in what it lacks.
_BOOTSTRAP = (
    f"import os, runpy, sys; sys.path += os.environ.pop('{_PATH_VARIABLE}').split(os.pathsep); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
NURSERY_TIMEOUT_S = 20.0
FORK_TIMEOUT_S = 10.0
"""A fork takes milliseconds, on a machine that is overrun seconds; a nursery that takes longer is done without."""
_PR_SET_CHILD_SUBREAPER = 36

_logger = logging.getLogger("enginehouse.execution")


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a worker: with which interpreter and variables."""

    interpreter: str = sys.executable
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def is_plain(self) -> bool:
        """Whether the server's own environment is what the worker wants."""
        return self.interpreter == sys.executable and not self.variables


class Child:
    """One worker process. `pidfd` becomes readable when it ends."""

    def __init__(self, pid: int, wait: Callable[[], int]) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._wait = wait
        self._reaped = False

    def kill(self) -> None:
        """Ends it and everything it has started, now. Until it is reaped the numbers are its own."""
        if self._reaped:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(self.pid, signal.SIGKILL)  # so young that it leads no group yet

    def reap(self) -> str:
        """After its end: how it ended, for people. Children that it left are ended too."""
        self.kill()
        status = self._wait()
        self._reaped = True
        os.close(self.pidfd)
        return describe_exit(status)


def raise_descriptor_limit() -> None:
    """A worker takes four descriptors of the server's; many systems allow 1,024 unless one asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Spawner:
    """One per server, used on its main thread alone: PR_SET_PDEATHSIG follows the thread that spawned."""

    def __init__(self) -> None:
        self._nursery: subprocess.Popen[bytes] | None = None
        self._to_nursery: socket.socket | None = None
        self._starting: asyncio.Task[None] | None = None
        self._forking = asyncio.Lock()

    async def prepare(self, launch: Launch) -> None:
        """Before `spawn`: waits until it will take no longer than a fork."""
        if not launch.is_plain:
            return
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start_nursery(), name="start the nursery")
        await asyncio.shield(self._starting)

    async def spawn(self, launch: Launch, arguments: Sequence[str]) -> tuple[Child, socket.socket]:
        """The child and the server's end of its channel. Raises OSError if it can't be started. Other models' requests
        don't wait for it: a fork on a busy machine may take many of their times."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            child = await self._from_nursery(theirs, arguments) if launch.is_plain else None
            if child is None and launch.is_plain:
                # Not the same channel: the nursery may have forked all the same, and two would share its messages.
                ours.close()
                theirs.close()
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            if child is None:
                child = _fresh_interpreter(launch, theirs, arguments)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return child, ours

    def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
        if self._to_nursery is not None:
            self._to_nursery.close()
        if self._nursery is not None:
            self._nursery.wait()
        self._to_nursery = self._nursery = self._starting = None

    async def _from_nursery(self, channel: socket.socket, arguments: Sequence[str]) -> Child | None:
        """None if the nursery fails; then a fresh interpreter does as well."""
        async with self._forking:
            if self._to_nursery is None:
                return None
            try:
                # A subreaper only while it matters: else it would adopt what models leave behind, too.
                _be_subreaper(True)
                pid = await self._forked(self._to_nursery, channel, arguments)
                return Child(pid, lambda: _wait_for(pid))
            except (OSError, ValueError) as problem:
                _logger.warning("starting a worker from a fresh interpreter: %s", problem or type(problem).__name__)
                self._abandon_nursery()
                return None
            except BaseException:
                self._abandon_nursery()  # its answer would be taken for the next one's
                raise
            finally:
                _be_subreaper(False)

    @staticmethod
    async def _forked(nursery: socket.socket, channel: socket.socket, arguments: Sequence[str]) -> int:
        socket.send_fds(nursery, [json.dumps(list(arguments)).encode()], [channel.fileno()])
        async with asyncio.timeout(FORK_TIMEOUT_S):
            answer = await asyncio.get_running_loop().sock_recv(nursery, PID.size)
        pid = _pid_in(answer)
        if pid <= 0:
            raise OSError("the nursery has gone")
        return pid

    async def _start_nursery(self) -> None:
        """Without a nursery workers start all the same, only slower."""
        nursery, ours = self._launch_nursery()
        self._nursery = nursery
        greeting = b""
        try:
            with suppress(OSError):  # too late is one, too
                async with asyncio.timeout(NURSERY_TIMEOUT_S):
                    greeting = await asyncio.get_running_loop().sock_recv(ours, len(READY))
        finally:
            if greeting != READY:
                ours.close()
                nursery.kill()
        if greeting != READY:
            _logger.warning("the nursery of workers does not start: each worker is a fresh interpreter")
            nursery.wait()
            return
        self._to_nursery = ours

    @staticmethod
    def _launch_nursery() -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        nursery = _start_program("nursery", Launch(), theirs, ())
        theirs.close()
        return nursery, ours

    def _abandon_nursery(self) -> None:
        """Nobody has the channel of a worker that it forked too late: that one ends, too."""
        _be_subreaper(False)
        if self._nursery is not None and self._nursery.poll() is None:
            os.killpg(self._nursery.pid, signal.SIGKILL)
        if self._to_nursery is not None:
            with suppress(OSError):  # it has said nothing, or the worker is init's
                _end_forked(_pid_in(self._to_nursery.recv(PID.size)))
        self.close()


def _fresh_interpreter(launch: Launch, channel: socket.socket, arguments: Sequence[str]) -> Child:
    process = _start_program("worker", launch, channel, arguments)
    return Child(process.pid, process.wait)


def _start_program(
    program: str, launch: Launch, channel: socket.socket, arguments: Sequence[str]
) -> subprocess.Popen[bytes]:
    module = f"enginehouse.execution.{program}"
    start = ["-m", module] if launch.interpreter == sys.executable else ["-c", _BOOTSTRAP, module]
    return subprocess.Popen(
        [launch.interpreter, *start, str(channel.fileno()), str(os.getpid()), *arguments],
        env=_environment(launch),
        pass_fds=(channel.fileno(),),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _environment(launch: Launch) -> dict[str, str]:
    environment = {**os.environ, **launch.variables}
    given = list(filter(None, [environment.get("PYTHONPATH", "")]))
    if launch.interpreter == sys.executable:
        environment["PYTHONPATH"] = os.pathsep.join([*PACKAGE_ROOTS, *given])
    else:
        environment[_PATH_VARIABLE] = os.pathsep.join([*PACKAGE_ROOTS, *filter(None, sys.path)])
    return environment


def _be_subreaper(wanted: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _pid_in(answer: bytes) -> int:
    """0 where the nursery forked nothing."""
    return int(PID.unpack(answer)[0]) if answer else 0


def _end_forked(pid: int) -> None:
    """A worker that nobody will use."""
    if pid > 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait_for(pid: int) -> int:
    """As Popen.returncode: negative for a signal."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def describe_exit(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-status} ({name})"
