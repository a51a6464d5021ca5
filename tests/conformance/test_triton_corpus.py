"""Every recorded answer of a real Triton, replayed against our server, at level strict.

The corpus lies beside the checkout (or where ENGINEHOUSE_CORPUS says); without it there is nothing to replay.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(os.environ.get("ENGINEHOUSE_CORPUS", ROOT.parent / "shared" / "conformance"))
PROFILES = ("main", "broken", "nocontrol", "restricted", "alt")
SERVE = f"{sys.executable} -m enginehouse serve"

pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason=f"no corpus at {CORPUS}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_case_is_answered_as_triton_answers(profile: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(CORPUS / "run.py"), "--launch", SERVE, "--profile", profile]
    command += ["--level", "strict", "--json", str(report), "--max-diffs", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, _failures(json.loads(report.read_text()), done.stdout)


def _failures(report: object, output: str) -> str:
    return f"{json.dumps(report)[:500]}\n{output[-6000:]}"
