"""A process that has imported what workers need and forks them: a start takes milliseconds, and workers share
the memory of what they have in common.

    python -m enginehouse.execution.nursery <descriptor> <server's pid>

Each request on the socket carries a channel's descriptor and the worker's arguments; the answer is its pid.
The worker is forked twice, so that the server adopts it: it is the server's child in every respect, and its
life doesn't hang on this process. One thread only, and no event loop: a fork here copies no lock that is held.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import struct
import sys
import time
from array import array

PID = struct.Struct("<i")
MAX_REQUEST_BYTES = 1 << 16
READY = b"ready"


def main() -> None:
    # All that a worker imports, before the first fork.
    import enginehouse.execution.worker as worker

    server = socket.socket(fileno=int(sys.argv[1]))
    server_pid = int(sys.argv[2])
    worker.die_with(server_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # what is shared stays shared: the collector writes into what it looks at
    server.send(READY)
    while True:
        data, ancillary, _, _ = server.recvmsg(MAX_REQUEST_BYTES, socket.CMSG_SPACE(array("i").itemsize))
        if not data:
            return
        [descriptor] = array("i", ancillary[0][2])
        pid = _fork_twice(server, descriptor, server_pid, json.loads(data))
        os.close(descriptor)
        server.send(PID.pack(pid))


def _fork_twice(server: socket.socket, descriptor: int, server_pid: int, arguments: list[str]) -> int:
    """The pid of the worker, whose parent has gone; 0 if it ended at once."""
    read_end, write_end = os.pipe()
    middle = os.fork()
    if middle == 0:
        worker_pid = os.fork()
        if worker_pid != 0:
            os._exit(0)
        server.close()
        os.close(read_end)
        os.setsid()  # before anybody knows it: what ends this process's group ends none that was handed out
        os.write(write_end, PID.pack(os.getpid()))
        os.close(write_end)
        _become_worker(descriptor, server_pid, arguments)
    os.close(write_end)
    os.waitpid(middle, 0)
    answer = os.read(read_end, PID.size)
    os.close(read_end)
    return int(PID.unpack(answer)[0]) if answer else 0


def _become_worker(descriptor: int, server_pid: int, arguments: list[str]) -> None:
    import enginehouse.execution.worker as worker

    status = 1
    try:
        gc.unfreeze()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        give_up_at = time.monotonic() + 5
        while os.getppid() != server_pid and time.monotonic() < give_up_at:
            time.sleep(0.0002)  # until the process between has ended
        _reseed()
        sys.argv = [worker.__file__ or "", str(descriptor), str(server_pid), *arguments]
        worker.main()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reseed() -> None:
    """numpy's global generator would give every worker the same numbers; Python's own reseeds itself."""
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()


if __name__ == "__main__":
    main()
