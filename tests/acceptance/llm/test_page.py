"""docs/llm.md, run as it stands against the example models."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from enginehouse.config.reading import parse_config
from enginehouse.testing.server import ServerProcess

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "llm.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    repository = ROOT / "model_repository"
    subprocess.run([sys.executable, str(repository / "build.py"), "pydoc_chat"], check=True, capture_output=True)
    with ServerProcess([repository], ["--model-control-mode=explicit", "--load-model=pydoc_chat"]) as server:
        yield server


@pytest.mark.parametrize("program", blocks("python"))
def test_programs_print_what_the_model_says(program: str, server: ServerProcess) -> None:
    here = program.replace("localhost:8000", server.http)
    done = subprocess.run([sys.executable, "-c", here], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "prompt_tokens=3" in done.stdout


@pytest.mark.parametrize("command", [line for block in blocks("bash") for line in block.splitlines()])
def test_commands_are_answered(command: str, server: ServerProcess) -> None:
    here = [*shlex.split(command.replace("localhost:8000", server.http)), "--fail", "--show-error"]
    done = subprocess.run(here, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_the_config_is_read(block: str) -> None:
    serving = parse_config(block, ".yaml").config.serving
    assert serving.llm.max_model_len == 4096
    assert serving.memory.kv_bytes == 2 << 30
