"""Environment variables that hold requests back, by the names that suites written for Triton set.

Read when a scheduler or front end is built. Without them nothing here has any effect.
"""

from __future__ import annotations

import os


def _count(name: str) -> int:
    try:
        return max(int(os.environ.get(name, "0")), 0)
    except ValueError:
        return 0


def delay_scheduler() -> int:
    """No batch is started before so many requests are queued, once after loading."""
    return _count("TRITONSERVER_DELAY_SCHEDULER")


def backlog_delay_scheduler() -> int:
    """Sequences: no batch is started before so many sequences wait for a slot, once after loading."""
    return _count("TRITONSERVER_BACKLOG_DELAY_SCHEDULER")


def delay_ms(stage: str) -> int:
    """For front ends: TRITONSERVER_DELAY_<stage>, e.g. GRPC_RESPONSE, GRPC_PROCESS, RESPONSE_COMPLETION."""
    return _count(f"TRITONSERVER_DELAY_{stage}")
