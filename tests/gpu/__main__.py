"""`make test-gpu` and `make bench-gpu`: what only hardware can show, in stages of under nine minutes.

    python -m tests.gpu test|bench|STAGE … [--results FOLDER]

Each stage is a process of its own with a limit. What it prints goes to FOLDER/STAGE.txt as it comes, and one
line about it to FOLDER/stages.jsonl, so that whatever was reached before a machine goes away is kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_S = 540
NOTHING_TO_RUN = 5
"""pytest's status where a library is missing, or no test is of the stage's kind."""
PYTEST = (sys.executable, "-m", "pytest", "-rA", "--show-capture=no", "-p", "no:cacheprovider", "--timeout=300")
LLM_SPEED = (sys.executable, "-m", "tests.gpu.llm_speed")
ON_DEVICE = {"ENGINEHOUSE_TEST_DEVICE": "cuda:0"}
ROOTS = ("server", "backends", "clients/python")
LIBRARIES = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "transformers", "triton", "cuda-python")


@dataclass(frozen=True, slots=True)
class Stage:
    command: Sequence[str]
    is_bench: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


STAGES = {
    "conformance": Stage((*PYTEST, "tests/conformance/backends"), environment={"ENGINEHOUSE_TEST_DEVICE": "cuda:0"}),
    "backends": Stage((*PYTEST, "tests/gpu/test_backends.py")),
    "steps": Stage(
        (*PYTEST, "tests/faults/test_device_tensors.py"), environment={"ENGINEHOUSE_TEST_DEVICE": "cuda:0"}
    ),
    "tensorrt": Stage((*PYTEST, "tests/gpu/test_tensorrt.py")),
    "server": Stage((*PYTEST, "tests/gpu/test_server.py")),
    "llm-kernels": Stage((*PYTEST, "tests/properties/llm_kernels"), environment=ON_DEVICE),
    "llm": Stage((*PYTEST, "tests/gpu/test_llm.py"), environment=ON_DEVICE),
    "llm-quantized": Stage((*PYTEST, "tests/acceptance/llm/test_quantized_on_gpus.py"), environment=ON_DEVICE),
    "marked": Stage((*PYTEST, "-m", "gpu", "tests/unit", "tests/properties", "tests/acceptance")),
    "speed": Stage((sys.executable, "-m", "tests.gpu.speed"), is_bench=True),
    "llm-decode": Stage((*LLM_SPEED, "decode"), is_bench=True),
    "llm-32": Stage((*LLM_SPEED, "concurrent", "--num", "32"), is_bench=True),
    "llm-256": Stage((*LLM_SPEED, "concurrent", "--num", "256"), is_bench=True),
    "llm-prefill": Stage((*LLM_SPEED, "prefill"), is_bench=True),
    "llm-decode-fp8": Stage((*LLM_SPEED, "decode", "--quantization", "fp8"), is_bench=True),
    "llm-decode-int4": Stage((*LLM_SPEED, "decode", "--quantization", "int4"), is_bench=True),
    "llm-vllm": Stage((sys.executable, "-m", "tests.gpu.llm_peer"), is_bench=True),
}


def hardware() -> dict[str, Any]:
    """What the results were seen on."""
    import torch

    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"gpus": gpus, "cuda": torch.version.cuda, "versions": versions}


def import_paths(results: Path) -> list[str]:
    """Where Enginehouse lies, if it isn't installed: its folders, and one that names its backends."""
    try:
        metadata.version("enginehouse")
    except metadata.PackageNotFoundError:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = results / "installed" / "enginehouse-0.dist-info"
        named.mkdir(parents=True, exist_ok=True)
        (named / "METADATA").write_text("Metadata-Version: 2.1\nName: enginehouse\nVersion: 0\n")
        lines = []
        for group, entries in project["entry-points"].items():
            lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
        (named / "entry_points.txt").write_text("\n".join(lines) + "\n")
        return [*(str(ROOT / root) for root in ROOTS), str(named.parent)]
    return []


def run_stage(name: str, results: Path) -> dict[str, Any]:
    """Writes the stage's output as it comes; gives back the line for stages.jsonl."""
    stage, log = STAGES[name], results / f"{name}.txt"
    started_s = time.monotonic()
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        **stage.environment,
        "ENGINEHOUSE_GPU_RESULTS": str(results),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([*import_paths(results), os.environ.get("PYTHONPATH", "")]),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status: int | str = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"stopped after {LIMIT_S} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {
        "stage": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "status": status,
        "seconds": round(time.monotonic() - started_s, 1),
        "last_line": lines[-1] if lines else "",
        **hardware(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=["test", "bench", *STAGES])
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    kinds = {"test": False, "bench": True}
    wanted = [
        name
        for asked in arguments.stages
        for name in ([s for s in STAGES if STAGES[s].is_bench is kinds[asked]] if asked in kinds else [asked])
    ]
    failed = False
    for name in wanted:
        print(f"{name} …", flush=True)
        line = run_stage(name, arguments.results)
        with (arguments.results / "stages.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: {line['status']} in {line['seconds']} s · {line['last_line']}", flush=True)
        failed |= line["status"] not in (0, NOTHING_TO_RUN)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
