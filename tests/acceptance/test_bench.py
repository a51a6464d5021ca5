"""`make bench` measures what it says, on one small model and both protocols."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from enginehouse.testing.server import free_port

ROOT = Path(__file__).resolve().parents[2]


def test_a_short_run_measures_both_protocols_and_writes_its_table(tmp_path: Path) -> None:
    page, figures = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    command = [sys.executable, "-m", "tests.bench", "--models", "identity", "--concurrency", "1,4", "--seconds", "0.5"]
    command += ["--no-peer", f"--port={free_port()}", f"--report={page}", f"--json={figures}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())
    assert [(row["protocol"], row["concurrency"]) for row in rows] == [
        ("http", 1),
        ("grpc", 1),
        ("http", 4),
        ("grpc", 4),
    ]
    for row in rows:
        assert row["num_bad"] == 0
        assert row["requests_per_second"] > 20
        assert 0 < row["p50_ms"] <= row["p99_ms"]
    text = page.read_text()
    assert "old" not in text
    assert "| identity | grpc | 4 |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
