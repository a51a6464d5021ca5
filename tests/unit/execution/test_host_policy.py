"""Host policies name CPU cores, by themselves or by their NUMA node."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from enginehouse.errors import InvalidArgument
from enginehouse.execution.host_policy import cores_of_policies, parse_cores, run_on


def test_cores_are_written_as_the_kernel_writes_them() -> None:
    assert parse_cores("0-3,8,10-11") == (0, 1, 2, 3, 8, 10, 11)


def test_a_nodes_cores_are_read_and_cores_win_over_the_node(tmp_path: Path) -> None:
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text("4-5\n")
    policies = {"a": {"numa-node": "1"}, "b": {"cpu-cores": "7", "numa-node": "1"}}
    assert cores_of_policies(policies, tmp_path) == {"a": (4, 5), "b": (7,)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cores": "1"}, "Unsupported host policy setting 'cores'"),
        ({"cpu-cores": "x"}, "cpu-cores is cores such as 0-3,8, got 'x'"),
        ({"numa-node": "9"}, "no NUMA node 9"),
    ],
)
def test_what_this_machine_lacks_is_refused(settings: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=said):
        cores_of_policies({"p": settings}, tmp_path)


def test_a_thread_stays_on_its_cores_and_the_others_where_they_were() -> None:
    allowed = os.sched_getaffinity(0)
    core, seen = min(allowed), list[set[int]]()

    def work() -> None:
        run_on((core,))
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (seen, os.sched_getaffinity(0)) == ([{core}], allowed)
