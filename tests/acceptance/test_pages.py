"""README's first steps and the curl commands of the operations and metrics pages, run against the example models."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from enginehouse.testing.server import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "model_repository"


def curl_commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("curl ")]


@pytest.fixture(scope="module")
def server(examples: ServerProcess) -> Iterator[ServerProcess]:
    """Started as the page on traces says; the other examples are there and not loaded."""
    assert examples.pid, "the example models are built"
    flags = ["--model-control-mode=explicit", "--load-model=digits", "--trace-config=triton,file=/dev/null"]
    with ServerProcess([EXAMPLES], flags) as server:
        yield server


@pytest.mark.parametrize("page", ["operations.md", "metrics.md"])
def test_what_the_pages_tell_to_type_works(page: str, server: ServerProcess) -> None:
    commands = curl_commands(page)
    assert commands
    for command in commands:
        here = command.replace("localhost:8000", server.http)
        here = here.replace("localhost:8002", f"127.0.0.1:{server.metrics_port}")
        done = subprocess.run(
            [*shlex.split(here), "--fail", "--show-error"], capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
        if "/metrics" not in command:
            assert "error" not in json.loads(done.stdout), command


def blocks_of_readme(language: str, word: str, server: ServerProcess) -> str:
    """The one block that has the word, with the server's address for the usual one."""
    text = (ROOT / "README.md").read_text()
    [block] = [each for each in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL) if word in each]
    return str(block).replace("localhost:8000", server.http)


def test_the_readmes_first_request_is_answered(examples: ServerProcess) -> None:
    command = ["bash", "-c", blocks_of_readme("bash", "curl", examples)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    [output] = json.loads(done.stdout)["outputs"]
    assert (output["name"], output["shape"]) == ("embedding", [2, 384])


def test_the_readmes_language_model_answers(examples: ServerProcess) -> None:
    command = [sys.executable, "-c", blocks_of_readme("python", "openai", examples)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
