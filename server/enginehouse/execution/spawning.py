"""Starts a worker as a fresh interpreter and tells how it ended.

Never a fork of the server: it has threads. The worker leads a process group of its own, so that what it
starts can be ended with it, and a terminal's Ctrl-C reaches the server alone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE_ROOTS = [str(Path(__file__).parents[2])]


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a worker: with which interpreter, variables and search path."""

    interpreter: str = sys.executable
    variables: Mapping[str, str] = field(default_factory=dict)
    search_path: Sequence[str] = ()
    """Folders before the interpreter's own packages."""


class Child:
    """One worker process. `pidfd` becomes readable when it ends."""

    def __init__(self, process: subprocess.Popen[bytes], pidfd: int) -> None:
        self._process = process
        self.pid = process.pid
        self.pidfd = pidfd

    def kill(self) -> None:
        """Ends it and everything it has started, now. Only before `reap`: the group's number is its own."""
        if self._process.returncode is not None:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()

    def reap(self) -> str:
        """After its end: how it ended, for people. Children that it left are ended too."""
        self.kill()
        status = self._process.wait()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        return describe_exit(status)


def spawn(launch: Launch, arguments: Sequence[str]) -> tuple[Child, socket.socket]:
    """The child and the server's end of its channel. Call on the main thread: PR_SET_PDEATHSIG follows the
    thread that spawned. Raises OSError if it can't be started."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    environment = {**os.environ, **launch.variables}
    path = [*launch.search_path, *PACKAGE_ROOTS, *filter(None, [environment.get("PYTHONPATH", "")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [
        launch.interpreter, "-m", "enginehouse.execution.worker", str(theirs.fileno()), str(os.getpid()),
        *arguments,
    ]  # fmt: skip
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Child(process, os.pidfd_open(process.pid)), ours


def describe_exit(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-status} ({name})"
