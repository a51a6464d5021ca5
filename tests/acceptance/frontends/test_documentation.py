"""The commands of docs/protocols.md, run as they stand, in order."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from enginehouse.testing.server import ServerProcess

PAGE = Path(__file__).parents[3] / "docs" / "protocols.md"
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_page_does_what_it_says(wire: ServerProcess) -> None:
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) > 10
    script = "set -euxo pipefail\n" + "\n".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "HTTP": wire.http},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
