"""Host policies: on which CPU cores instances run. Triton's settings `cpu-cores` and `numa-node`.

Memory follows by first touch: a thread that runs on a node's cores gets that node's memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from enginehouse.errors import InvalidArgument

_NODES = Path("/sys/devices/system/node")


def parse_cores(text: str) -> tuple[int, ...]:
    """`0-3,8` as (0, 1, 2, 3, 8). Raises ValueError."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cores))


def cores_of_policies(policies: Mapping[str, Mapping[str, str]], nodes: Path = _NODES) -> dict[str, tuple[int, ...]]:
    """The cores of each policy: those of `cpu-cores`, else those of `numa-node`.

    Raises InvalidArgument for a setting that doesn't exist or a node that this machine lacks.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, settings in policies.items():
        for key, value in settings.items():
            if key not in ("cpu-cores", "numa-node"):
                raise InvalidArgument(
                    f"Unsupported host policy setting '{key}' is specified for '{name}', supported settings are "
                    "'numa-node', 'cpu-cores'"
                )
            try:
                cores = parse_cores(value if key == "cpu-cores" else (nodes / f"node{int(value)}/cpulist").read_text())
            except ValueError as problem:
                form = "cores such as 0-3,8" if key == "cpu-cores" else "the number of a NUMA node"
                raise InvalidArgument(f"host policy '{name}': {key} is {form}, got '{value}'") from problem
            except OSError as problem:
                raise InvalidArgument(f"host policy '{name}': this machine has no NUMA node {value}") from problem
            if key == "cpu-cores" or name not in found:
                found[name] = cores
    return found


def run_on(cores: tuple[int, ...]) -> None:
    """Keeps the calling thread, and those that it starts, on these cores; on all of them if there are none."""
    if cores:
        os.sched_setaffinity(0, cores)
