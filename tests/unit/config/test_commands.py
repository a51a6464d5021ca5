"""The command line: what people see and what scripts get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from enginehouse.cli import main
from enginehouse.config.reading import read_file

GOOD = """
max_batch_size: 4
input: {name: X, data_type: fp32, dims: [-1, 3], reshape: [-1, 3, 1]}
output: {name: Y, data_type: fp32, dims: 2}
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    add(tmp_path, "good", GOOD)
    return tmp_path


def add(root: Path, name: str, config: str, *files: str) -> Path:
    folder = root / name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").touch()
    (folder / "config.yaml").write_text(config)
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["config", *map(str, arguments)])


def test_a_good_repository_passes(repository: Path) -> None:
    result = run("lint", repository)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "nothing wrong\n")


def test_lint_finds_everything_with_its_place(repository: Path) -> None:
    add(
        repository,
        "bad",
        "max_batch_size: 4\n"
        "dynamic_batching: {preferred_batch_size: [2, 8]}\n"
        "input:\n"
        "- {name: X, data_type: fp32, dims: [0]}\n"
        "- {name: X, data_type: fp32, dims: [1]}\n"
        "output: {name: Y, data_type: fp32, dims: [1], label_filename: labels.txt}\n"
        "model_warmup: {name: w}\n"
        "version_policy: {specific: [1, 7]}\n",
    )
    result = run("lint", repository)
    lines = [line.removeprefix(f"{repository}/bad/config.yaml:") for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert result.stderr == "2 errors, 4 warnings\n"
    assert lines == [
        "2:46: error: dynamic_batching.preferred_batch_size[1]: dynamic batching preferred size must be <= max "
        "batch size for bad",
        "4:37: error: input[0].dims[0]: model input 'X' dimension must be integer >= 1, or -1 to indicate a "
        "variable-size dimension for bad",
        "5:3: warning: input[1]: 'X' is there twice",
        "7:15: warning: model_warmup[0]: runs nothing while batch_size is 0",
        "8:28: warning: version_policy.specific.versions: version 7 is not there",
        "6:47: warning: output[0].label_filename: there is no file 'labels.txt'",
    ]


def test_warnings_fail_when_strict(repository: Path) -> None:
    add(repository, "odd", "dynamic_batching: {}\nbackend: pyhton\n")
    assert run("lint", repository).exit_code == 0
    result = run("lint", "--strict", repository / "odd")
    assert result.exit_code == 1
    assert "dynamic_batching: does nothing while max_batch_size is 0" in result.stdout
    assert "there is no backend 'pyhton'; did you mean 'python'?" in result.stdout


def test_an_ensembles_models_must_be_beside_it(repository: Path) -> None:
    folder = add(
        repository,
        "both",
        "platform: ensemble\n"
        "input: {name: P, data_type: fp32, dims: 1}\n"
        "output: {name: Q, data_type: fp32, dims: 1}\n"
        "ensemble_scheduling: {step: {model_name: goood, model_version: -1, input_map: {X: P}, output_map: {Y: Q}}}\n",
    )
    text = "there is no model 'goood' beside this one; did you mean 'good'?"
    assert text in run("lint", repository).stdout
    assert run("lint", folder).stdout == ""


def test_show_completes_and_explains(repository: Path) -> None:
    shown = yaml.safe_load(run("show", repository / "good").stdout)
    assert (shown["name"], shown["backend"], shown["default_model_filename"]) == ("good", "python", "model.py")
    wire = json.loads(run("show", repository / "good", "--format", "wire").stdout)
    assert wire["input"][0]["dims"] == [-1, 3]
    assert wire["model_warmup"] == []
    assert "backend" not in yaml.safe_load(run("show", repository / "good", "--as-written").stdout)
    assert run("show", repository / "good", "--explain").stdout == (
        "good: python, up to 4 rows in front\n"
        "  input X: FP32 [any, any, 3], [any, any, 3, 1] in the model\n"
        "  output Y: FP32 [any, 2]\n"
    )


def test_convert_keeps_the_meaning(repository: Path) -> None:
    source = repository / "good" / "config.yaml"
    target = repository / "config.pbtxt"
    assert run("convert", repository / "good", "-o", target).exit_code == 0
    assert read_file(target).config == read_file(source).config
    assert json.loads(run("convert", source, "--to", "json").stdout)["input"][0]["data_type"] == "TYPE_FP32"
    assert "is no spelling" in run("convert", source, "-o", "config.toml").stderr


def test_unreadable_configs_end_with_their_error(repository: Path) -> None:
    folder = add(repository, "bad", "max_batch_size: many")
    result = run("show", folder)
    assert result.exit_code == 1
    assert "config.yaml:1:17: max_batch_size: found 'many'; allowed: an integer" in result.stderr
    assert "error: max_batch_size: found 'many'" in run("lint", folder).stdout
