"""config.yaml, read into a tree with positions, and printed. YAML 1.1 as PyYAML reads it."""

from __future__ import annotations

from typing import Any

import yaml

from enginehouse.config.plain import to_plain
from enginehouse.config.problems import ConfigError, Position
from enginehouse.config.schema import ModelConfig
from enginehouse.config.tree import Entry, Fields, Items, Node, Scalar

MAX_DEPTH = 100
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_tree(text: str, source: str = "") -> Fields:
    """The tree of a config.yaml. Raises ConfigError."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return Fields(Position(source, 1, 1))
        tree = _convert(root, source, loader, 0)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_describe(error), _position(error.problem_mark, source)) from None
    except yaml.YAMLError as error:
        raise ConfigError(str(error), Position(source)) from None
    finally:
        loader.dispose()
    if not isinstance(tree, Fields):
        raise ConfigError("found no mapping", tree.position, allowed="field: value")
    return tree


def _describe(error: yaml.MarkedYAMLError) -> str:
    return ", ".join(part for part in (error.context, error.problem) if part) or "not YAML"


def _position(mark: Any, source: str) -> Position:
    return Position(source, mark.line + 1, mark.column + 1) if mark is not None else Position(source)


def _convert(node: yaml.Node, source: str, loader: Any, depth: int) -> Node:
    position = _position(node.start_mark, source)
    if depth > MAX_DEPTH:
        raise ConfigError(f"nested deeper than {MAX_DEPTH}", position)
    if isinstance(node, yaml.MappingNode):
        fields = Fields(position)
        for key, value in node.value:
            where = _position(key.start_mark, source)
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                raise ConfigError("found a key that is no plain word", where)
            fields.entries.append(Entry(key.value, _convert(value, source, loader, depth + 1), where))
        return fields
    if isinstance(node, yaml.SequenceNode):
        return Items([_convert(item, source, loader, depth + 1) for item in node.value], position)
    if node.tag not in _TAGS:
        return Scalar(node.value, node.value, position, quoted=True)  # dates and the like are texts here
    return Scalar(_scalar(node, position, loader), node.value, position, quoted=node.tag.endswith(":str"))


def _scalar(node: Any, position: Position, loader: Any) -> Any:
    try:
        return loader.construct_object(node)
    except ValueError as error:
        raise ConfigError(f"found '{node.value}': {error}", position) from None


class _Dumper(yaml.SafeDumper):
    """Lists of scalars stand in one line: `dims: [-1, 3]`."""


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    is_flat = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=is_flat)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """In double quotes where PyYAML would fold a line end that is not \\n into a space."""
    style = '"' if any(character in text for character in "\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def print_yaml(config: ModelConfig) -> str:
    """The config as a config.yaml: only what is set."""
    return yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
