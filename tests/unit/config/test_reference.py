"""The documentation of configs is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from enginehouse.config.reading import parse_config
from enginehouse.config.reference import reference

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_reference_is_current() -> None:
    assert (DOCS / "configuration-reference.md").read_text() == reference(), (
        "run: enginehouse config reference > docs/configuration-reference.md"
    )


def test_links_of_the_reference_lead_somewhere() -> None:
    content = reference()
    anchors = {heading.lower().replace(".", "") for heading in re.findall(r"^## (\S+)$", content, re.MULTILINE)}
    assert set(re.findall(r"\(#(\S+?)\)", content)) <= anchors


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", (DOCS / "configuration.md").read_text(), re.DOTALL))
def test_yaml_in_the_docs_is_read(block: str) -> None:
    assert parse_config(block, ".yaml").config.max_batch_size == 8
