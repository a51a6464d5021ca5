"""What docs/scheduling.md shows is accepted, and its rule does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from enginehouse.config import completion, validation
from enginehouse.config.reading import parse_config
from enginehouse.scheduling.batch_rule import load_rule

from .factories import rig_of

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "scheduling.md").read_text()
TENSORS = """input [ { name: "X" data_type: TYPE_INT32 dims: [ 1 ] } ]
    output [ { name: "Y" data_type: TYPE_INT32 dims: [ 1 ] } ]"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", blocks("pbtxt"))
def test_every_config_gets_a_scheduler(block: str, tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(blocks("python")[0])
    tensors = "" if "input [" in block else TENSORS
    backend = "" if "ensemble" in block else 'backend: "onnxruntime"'
    config = parse_config(f'name: "m" {backend} {tensors} {block}', ".pbtxt").config
    config = completion.at_load(config, tmp_path)
    validation.validate(config)
    rig_of(config, model_directory=tmp_path).scheduler.close()


def test_the_rule_is_one(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(blocks("python")[0])
    assert callable(load_rule("rules:same_voice", tmp_path))
