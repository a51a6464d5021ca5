"""Log lines as scripts written for Triton read them, and settings that change while the server runs."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from enginehouse.errors import Internal, InvalidArgument, Unavailable, Unsupported
from enginehouse.observe.logs import (
    LogSettings,
    ServerLogging,
    escaping_wanted,
    fields,
    log_for_model,
    unescaped,
    verbose,
)
from enginehouse.observe.tables import backends_table, models_table, options_table, server_table, table
from enginehouse.options import parse_options

LINE = re.compile(r"([IWE])(\d{4}) (\d\d:\d\d:\d\d\.\d{6}) (\d+) ([\w.]+):(\d+)\] (.*)", re.DOTALL)
logger = logging.getLogger("enginehouse.tests")


@pytest.fixture
def settings() -> Iterator[LogSettings]:
    settings = LogSettings()
    with ServerLogging(settings):
        yield settings


@pytest.mark.usefixtures("settings")
def test_a_line_has_tritons_form_and_a_quoted_message(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("successfully loaded '%s'", "simple")
    match = LINE.fullmatch(capsys.readouterr().out.rstrip("\n"))
    assert match is not None
    assert match[1] == "I"
    assert match[5] == "test_logs.py"
    assert json.loads(match[7]) == "successfully loaded 'simple'"


@pytest.mark.usefixtures("settings")
def test_warnings_and_errors_go_to_stderr_and_the_rest_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("a")
    logger.warning("b")
    logger.error("c")
    logger.critical("d")
    out, err = capsys.readouterr()
    assert [line[0] for line in out.splitlines()] == ["I"]
    assert [line[0] for line in err.splitlines()] == ["W", "E", "E"]


@pytest.mark.usefixtures("settings")
def test_a_message_can_not_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("input 'x\nI0205 18:34:18.707423 1 file.cc:123] injected'")
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_escaping_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    with ServerLogging(LogSettings(escape=escaping_wanted({"TRITON_SERVER_ESCAPE_LOG_MESSAGES": "0"}))):
        logger.info('say "hi"')
    assert capsys.readouterr().out.endswith('] say "hi"\n')
    assert escaping_wanted({})


def test_iso8601(capsys: pytest.CaptureFixture[str], settings: LogSettings) -> None:
    settings.apply_json({"log_format": "ISO8601"})
    logger.info("x")
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ I \d+ test_logs\.py:\d+\] "x"\n', capsys.readouterr().out)


def test_json_lines_carry_fields_and_tracebacks(capsys: pytest.CaptureFixture[str], settings: LogSettings) -> None:
    settings.apply_json({"log_format": "json"})
    try:
        raise ValueError("boom")
    except ValueError:
        logger.exception("failed", extra=fields(model="m", version=3))
    line = json.loads(capsys.readouterr().err)
    assert line["level"] == "ERROR"
    assert (line["model"], line["version"]) == ("m", 3)
    assert "ValueError: boom" in line["message"]


@pytest.mark.usefixtures("settings")
def test_tables_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info(table(("A",), [("x",)]), extra=unescaped())
    assert capsys.readouterr().out.splitlines()[1:] == ["+---+", "| A |", "+---+", "| x |", "+---+", ""]


def test_verbose_lines_need_their_level(capsys: pytest.CaptureFixture[str], settings: LogSettings) -> None:
    logger.log(verbose(1), "unseen")
    assert not logger.isEnabledFor(verbose(1))
    settings.apply_json({"log_verbose_level": 2})
    logger.log(verbose(2), "two")
    logger.log(verbose(3), "three")
    out = capsys.readouterr().out
    assert out.startswith("I")  # Triton has no letter of its own for them
    assert "two" in out
    assert "three" not in out
    assert "unseen" not in out


def test_levels_are_switched_one_by_one(capsys: pytest.CaptureFixture[str], settings: LogSettings) -> None:
    settings.apply_json({"log_info": False, "log_warning": False})
    logger.info("a")
    logger.warning("b")
    logger.error("c")
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    settings.apply_json({"log_error": False})
    logger.error("d")
    assert capsys.readouterr().err == ""


def test_a_log_file_takes_all_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "server.log"
    with ServerLogging(LogSettings(file=str(path))):
        logger.info("a")
        logger.error("b")
    assert [line[0] for line in path.read_text().splitlines()] == ["I", "E"]
    assert capsys.readouterr() == ("", "")


def test_loggers_are_as_before_when_it_is_closed() -> None:
    root = logging.getLogger("enginehouse")
    before = (root.level, root.propagate, list(root.handlers))
    with ServerLogging(LogSettings()):
        assert not root.propagate
    assert (root.level, root.propagate, list(root.handlers)) == before


@pytest.mark.usefixtures("settings")
def test_models_log_under_their_own_file_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    log_for_model("WARNING", "100 %s hot", "/models/m/1/model.py", 12)
    match = LINE.fullmatch(capsys.readouterr().err.rstrip("\n"))
    assert match is not None
    assert (match[1], match[5], match[6], match[7]) == ("W", "model.py", "12", '"100 %s hot"')


@pytest.mark.parametrize(
    ("document", "error", "text"),
    [
        ({"log_file": "x"}, Unsupported, "log file location can not be updated through network protocol"),
        ({"log_info": "yes"}, Internal, "attempt to access JSON non-boolean as boolean"),
        ({"log_verbose_level": -1}, Internal, "non-unsigned-integer as unsigned-integer"),
        ({"log_verbose_level": True}, Internal, "non-unsigned-integer as unsigned-integer"),
        ({"log_format": 3}, Internal, "attempt to access JSON non-string as string"),
        ({"log_format": "xml"}, Unavailable, "invalid argument for --log_format, got: xml"),
    ],
)
def test_bad_http_updates(document: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        LogSettings().apply_json(document)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"log_file": "x"}, Unsupported, "log file location can not be updated through network protocol"),
        ({"log_info": "x"}, InvalidArgument, "expect boolean for 'log_info'"),
        ({"log_verbose_level": "x"}, InvalidArgument, "expect int32 for 'log_verbose_level'"),
        ({"log_format": True}, InvalidArgument, "expect string for 'log_format'"),
        ({"log_format": "xml"}, InvalidArgument, "invalid argument for log_format, got: xml"),
    ],
)
def test_bad_grpc_updates(given: dict[str, bool | int | str], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        LogSettings().apply_grpc(given)


def test_keys_before_a_bad_one_are_applied_and_unknown_or_null_ones_ignored() -> None:
    settings = LogSettings()
    with pytest.raises(Internal):
        settings.apply_json({"log_error": "no", "log_info": False, "colour": 1, "log_warning": None})
    assert settings.as_dict() == {
        "log_file": "",
        "log_info": False,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 0,
        "log_format": "default",
    }


def test_start_up_tables() -> None:
    text = models_table(
        [
            ("a", "1", "READY", ""),
            ("b", "1", "UNAVAILABLE", "Internal: boom\nat line 2"),
            ("c", "", "", "no version"),
        ]
    )
    lines = text.splitlines()
    assert lines[1].split("|")[1:4] == [" Model ", " Version ", " Status                      "]
    assert any("UNAVAILABLE: Internal: boom" in line for line in lines)
    assert any("| c     | -       | Not loaded: no version" in line for line in lines)
    assert len({len(line) for line in lines}) == 1
    assert "| model_repository_path[1] | /b" in options_table({"model_repository_path": ["/a", "/b"], "ready": True})


def test_the_server_says_what_it_runs_with() -> None:
    argv = ["--model-repository=/a", "--model-repository=/b", "--model-control-mode=explicit", "--load-model=m"]
    argv += ["--rate-limit=execution_count", "--backend-config=python,x=1", "--memory-limit=cpu=50%"]
    options = parse_options(argv, {})
    text = server_table(options, "1.2.3", ["statistics", "trace"])
    for row in (
        ("model_repository_path[1]", "/b"),
        ("model_control_mode", "MODE_EXPLICIT"),
        ("startup_models_0", "m"),
        ("rate_limit", "EXEC_COUNT"),
        ("strict_readiness", "1"),
        ("memory_limit[0]", "cpu=50%"),
    ):
        assert any(
            line.split("|")[1:3] and tuple(cell.strip() for cell in line.split("|")[1:3]) == row
            for line in text.splitlines()
            if line.startswith("|")
        ), row
    assert '{"cmdline": {"x": "1"}}' in backends_table({"python": "module:Class"}, options)
