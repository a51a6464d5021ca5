"""The configs that the pages show can be read, whichever way they are spelt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from enginehouse.config.reading import parse_config

DOCS = Path(__file__).resolve().parents[3] / "docs"
SUFFIXES = {"pbtxt": ".pbtxt", "protobuf": ".pbtxt", "yaml": ".yaml"}
BLOCKS = [
    pytest.param(SUFFIXES[language], block, id=f"{page.stem}-{index}")
    for page in sorted(DOCS.glob("*.md"))
    for index, (language, block) in enumerate(
        re.findall(r"```(pbtxt|protobuf|yaml)\n(.*?)```", page.read_text(), re.DOTALL)
    )
    if "# enginehouse serve" not in block  # options, read by test_deploy
]


@pytest.mark.parametrize(("suffix", "block"), BLOCKS)
def test_a_config_that_a_page_shows_can_be_read(suffix: str, block: str) -> None:
    assert parse_config(block, suffix).config.ByteSize() > 0
