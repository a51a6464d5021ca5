"""Every GPU kernel compiles for Hopper and Blackwell as its launcher launches it. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

_PROGRAM = """
import dataclasses, json, sys
from enginehouse_backends.llm.kernels.report import compile_cases
rows = [(what, dataclasses.asdict(launch)) for what, launch in compile_cases(int(sys.argv[1]))]
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("capability", "instruction"), [(90, "wgmma"), (100, "tcgen05")])
def test_kernels_compile_without_spilling(capability: int, instruction: str) -> None:
    # A process of its own: this one has Triton's interpreter on.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    launches = json.loads(done.stdout.splitlines()[-1])
    assert len(launches) > 30
    for what, launch in launches:
        # a shared-memory limit of 227 KiB a block on both
        assert launch["shared_bytes"] <= 227 * 1024, what
        assert launch["spilled_bytes"] <= 16, f"{what} spills {launch['spilled_bytes']} bytes"
    by_name = dict(launches)
    for what in ("prefill, Llama 3.1 8B", "experts, Qwen3-30B-A3B, 4096 rows", "FP8 product, 512 rows"):
        assert by_name[what]["matrix_instructions"] == instruction, f"{what} missed the fast matrix unit"
