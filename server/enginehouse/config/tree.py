"""A config as it stands in its file, before it has types: objects, lists and scalars with positions.

The three spellings (text.py, yaml_form.py, json_form.py) are read into this tree; building.py makes a
message of it, so that every spelling has the same rules and the same errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from enginehouse.config.problems import Position

Value: TypeAlias = bool | int | float | str | None


@dataclass(slots=True)
class Scalar:
    value: Value
    text: str
    """As written, without quotes."""
    position: Position
    quoted: bool = False


@dataclass(slots=True)
class Items:
    nodes: list[Node]
    position: Position


@dataclass(slots=True)
class Entry:
    key: str
    node: Node
    position: Position
    """Of the key."""


@dataclass(slots=True)
class Fields:
    """An object. Keys may repeat: in config.pbtxt that is how lists are written."""

    position: Position
    entries: list[Entry] = field(default_factory=list)


Node: TypeAlias = Scalar | Items | Fields


def describe(node: Node) -> str:
    """For messages: what was found."""
    match node:
        case Scalar():
            return f"'{node.text}'" if node.quoted else node.text
        case Items():
            return "a list"
        case Fields():
            return "an object"
