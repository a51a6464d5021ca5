"""JSON: config.json, the config that comes with a load request, and the config as the server answers it.

`to_wire` is Triton's form: every field that has a default is listed, 64-bit integers are numbers except in
the few places where Triton leaves protobuf's strings.
"""

from __future__ import annotations

import json
from json import decoder
from typing import Any

import orjson

from enginehouse.config.plain import to_plain
from enginehouse.config.problems import ConfigError, Position
from enginehouse.config.schema import ModelConfig
from enginehouse.config.tree import Entry, Fields, Items, Node, Scalar

MAX_DEPTH = 100
_WHITESPACE = " \t\n\r"
_scan_string: Any = decoder.scanstring  # type: ignore[attr-defined]  # not in the stubs
_DELIMITERS = frozenset(_WHITESPACE + ",]}")


def to_wire(config: ModelConfig) -> dict[str, Any]:
    """The config as `/v2/models/M/config` answers it and model.py gets it."""
    plain = to_plain(config, with_defaults=True)
    ensemble = plain.get("ensemble_scheduling")
    if ensemble is not None and not ensemble["max_inflight_requests"]:
        del ensemble["max_inflight_requests"]  # Triton lists it only where it is new enough to know it
    for group in plain["instance_group"]:
        for device in group["secondary_devices"]:
            device["device_id"] = str(device["device_id"])
    for state in plain.get("sequence_batching", {}).get("state", ()):
        for initial in state["initial_state"]:
            initial["dims"] = [str(dim) for dim in initial["dims"]]
    for graph in plain.get("optimization", {}).get("cuda", {}).get("graph_spec", ()):
        bound = graph.get("graph_lower_bound", {"input": {}})
        for shape in (*graph["input"].values(), *bound["input"].values()):
            shape["dim"] = [str(dim) for dim in shape["dim"]]
    return plain


def to_json(config: ModelConfig) -> str:
    """`to_wire` as text; empty for an empty config, as Triton has it."""
    return orjson.dumps(to_wire(config)).decode() if config.ByteSize() else ""


def print_json(config: ModelConfig) -> str:
    """The config as a config.json: only what is set."""
    return json.dumps(to_plain(config), indent=2, ensure_ascii=False) + "\n"


def read_tree(text: str, source: str = "") -> Fields:
    """The tree of a config.json. Raises ConfigError."""
    root = _Reader(text, source).document()
    if not isinstance(root, Fields):
        raise ConfigError("found no object", root.position, allowed="{ … }")
    return root


class _Reader:
    """JSON with positions; the standard library's parser keeps none."""

    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source
        self._offset = 0
        self._depth = 0

    def document(self) -> Node:
        node = self._value()
        self._skip()
        if self._offset < len(self._text):
            raise self._error("found more after the end", "nothing")
        return node

    def _position(self, offset: int | None = None) -> Position:
        at = self._offset if offset is None else offset
        before = self._text[:at]
        return Position(self._source, before.count("\n") + 1, at - (before.rfind("\n") + 1) + 1)

    def _error(self, what: str, allowed: str = "") -> ConfigError:
        return ConfigError(what, self._position(), allowed=allowed)

    def _skip(self) -> None:
        while self._offset < len(self._text) and self._text[self._offset] in _WHITESPACE:
            self._offset += 1

    def _peek(self) -> str:
        self._skip()
        return self._text[self._offset : self._offset + 1]

    def _accept(self, symbol: str) -> bool:
        if self._peek() != symbol:
            return False
        self._offset += 1
        return True

    def _found(self) -> str:
        character = self._peek()
        return f"found '{character}'" if character else "found the end of the file"

    def _value(self) -> Node:
        match self._peek():
            case "{":
                return self._nested(self._object)
            case "[":
                return self._nested(self._list)
            case '"':
                position = self._position()
                word = self._string()
                return Scalar(word, word, position, quoted=True)
            case _:
                return self._word()

    def _nested(self, read: Any) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"nested deeper than {MAX_DEPTH}")
        position = self._position()
        self._offset += 1
        node: Node = read(position)
        self._depth -= 1
        return node

    def _object(self, start: Position) -> Fields:
        fields = Fields(start)
        if self._accept("}"):
            return fields
        while True:
            if self._peek() != '"':
                raise self._error(self._found(), "a quoted field name")
            position = self._position()
            key = self._string()
            if not self._accept(":"):
                raise self._error(self._found(), "':'")
            fields.entries.append(Entry(key, self._value(), position))
            if self._accept("}"):
                return fields
            if not self._accept(","):
                raise self._error(f"{self._found()} in the object of line {start.line}", "',' or '}'")

    def _list(self, start: Position) -> Items:
        items = Items([], start)
        if self._accept("]"):
            return items
        while True:
            items.nodes.append(self._value())
            if self._accept("]"):
                return items
            if not self._accept(","):
                raise self._error(f"{self._found()} in the list of line {start.line}", "',' or ']'")

    def _string(self) -> str:
        try:
            text, self._offset = _scan_string(self._text, self._offset + 1, True)
        except json.JSONDecodeError as error:
            self._offset = min(error.pos, len(self._text))
            raise self._error(error.msg) from None
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self._error("found half of a surrogate pair")
        return str(text)

    def _word(self) -> Scalar:
        start = self._offset
        while self._offset < len(self._text) and self._text[self._offset] not in _DELIMITERS:
            self._offset += 1
        word = self._text[start : self._offset]
        try:
            value = json.loads(word)
        except json.JSONDecodeError:
            self._offset = start
            what = f"found '{word}'" if word else self._found()
            allowed = "text in quotes, a number, true, false, null, [ … ] or { … }"
            raise self._error(what, allowed) from None
        return Scalar(value, word, self._position(start))
