"""The command line: commands that backends bring."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from enginehouse import cli

GROUP = "enginehouse.commands"


def bring(monkeypatch: pytest.MonkeyPatch, name: str, target: str) -> None:
    entries = {name: metadata.EntryPoint(name, target, GROUP)}
    monkeypatch.setattr(cli, "_installed_commands", lambda: entries)


def test_command_of_a_backend_is_listed_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, "convert", "enginehouse_backends.tensorrt_engine.convert:convert")
    listed = CliRunner().invoke(cli.main, ["--help"]).output
    assert all(name in listed for name in ("config", "serve", "convert  From enginehouse_backends.tensorrt_engine"))
    assert "Build the TensorRT plan TARGET" in CliRunner().invoke(cli.main, ["convert", "--help"]).output


def test_command_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, "broken", "no_such_module:command")
    answer = CliRunner().invoke(cli.main, ["broken"])
    assert answer.exit_code == 1
    assert "'broken' can't be loaded: No module named 'no_such_module'" in answer.output


def test_unknown_command_is_refused() -> None:
    assert CliRunner().invoke(cli.main, ["dance"]).exit_code == 2


def test_a_log_file_that_cannot_be_written_is_refused_plainly(tmp_path: Path) -> None:
    answer = CliRunner().invoke(cli.main, ["serve", f"--model-repository={tmp_path}", "--log-file=/no/such/file"])
    assert answer.exit_code == 1
    assert answer.output == "error: can't write --log-file /no/such/file: No such file or directory\n"
