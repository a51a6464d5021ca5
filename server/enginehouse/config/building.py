"""From the tree of a file to the message: names, types, ranges, enums, oneofs, with errors that help.

Rules that hold in YAML and JSON alone: a list of one may stand without brackets; a message with a single
field may be given by that field's value (`response_cache: true`, `parameters: {a: b}`,
`version_policy: {latest: 2}`); enum values may drop their prefix and case (`kind: cpu`). null is absent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from enginehouse.config.problems import ConfigError, Position, nearest_match
from enginehouse.config.tree import Entry, Fields, Items, Node, Scalar, describe

M = TypeVar("M", bound=Message)
# protobuf's stubs know two unrelated classes for each kind of descriptor
Descriptor: TypeAlias = Any

INTEGER_RANGES = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}
_FLOAT_WORDS = {"nan": math.nan, "inf": math.inf, "infinity": math.inf, "-inf": -math.inf}
_FLOAT_WORDS["-infinity"] = -math.inf
_TEXT_BOOLEANS = {"true": True, "True": True, "t": True, "1": True}
_TEXT_BOOLEANS |= {"false": False, "False": False, "f": False, "0": False}
_ENUM_ALIASES = {"bytes": "TYPE_STRING"}


@dataclass(slots=True)
class Builder:
    """Fills one message. `positions` afterwards has the place of every field that was given."""

    is_text_format: bool
    positions: dict[str, Position] = field(default_factory=dict)

    def fill(self, message: Message, fields: Fields, path: str = "") -> None:
        seen: dict[str, Entry] = {}
        for entry in fields.entries:
            descriptor = self._find_field(message.DESCRIPTOR, entry, path)
            name = descriptor.name
            where = f"{path}.{name}" if path else name
            if not self.is_text_format and isinstance(entry.node, Scalar) and entry.node.value is None:
                continue
            self._refuse_second(descriptor, seen, entry, where)
            seen[name] = entry
            self.positions.setdefault(where, entry.position)
            if _is_map(descriptor):
                self._fill_map(message, descriptor, entry.node, where)
            elif descriptor.is_repeated:
                self._fill_list(message, descriptor, entry.node, where)
            elif descriptor.message_type is not None:
                child = getattr(message, name)
                child.SetInParent()
                self._fill_child(child, entry.node, where)
            else:
                setattr(message, name, self._scalar(descriptor, entry.node, where))

    def _find_field(self, owner: Descriptor, entry: Entry, path: str) -> Descriptor:
        found = owner.fields_by_name.get(entry.key)
        if found is None and not self.is_text_format:
            found = owner.fields_by_camelcase_name.get(entry.key)
        if found is not None:
            return found
        raise ConfigError(
            f"there is no field '{entry.key}' in {owner.name}",
            entry.position,
            field=path,
            allowed=", ".join(sorted(owner.fields_by_name)),
            nearest=nearest_match(entry.key, owner.fields_by_name),
        )

    def _refuse_second(
        self, descriptor: Descriptor, seen: dict[str, Entry], entry: Entry, where: str
    ) -> None:
        first = seen.get(descriptor.name)
        repeats = descriptor.is_repeated and self.is_text_format
        if first is not None and not repeats:
            line = first.position.line
            raise ConfigError(f"given twice, first in line {line}", entry.position, field=where)
        oneof = descriptor.containing_oneof
        for rival in oneof.fields if oneof is not None and first is None else ():
            if rival.name in seen:
                raise ConfigError(
                    f"'{descriptor.name}' can't stand beside '{rival.name}' "
                    f"(line {seen[rival.name].position.line}); one of them decides '{oneof.name}'",
                    entry.position,
                    field=where,
                    allowed="one of " + ", ".join(member.name for member in oneof.fields),
                )

    def _fill_child(self, child: Message, node: Node, where: str) -> None:
        if isinstance(node, Fields):
            self.fill(child, node, where)
            return
        only = child.DESCRIPTOR.fields
        if not self.is_text_format and len(only) == 1:
            self.fill(child, Fields(node.position, [Entry(only[0].name, node, node.position)]), where)
        elif self.is_text_format or only or not isinstance(node, Scalar) or node.value is not True:
            raise ConfigError(
                f"found {describe(node)}",
                node.position,
                field=where,
                allowed="an object with " + ", ".join(sorted(child.DESCRIPTOR.fields_by_name)),
            )

    def _fill_list(self, message: Message, descriptor: Descriptor, node: Node, where: str) -> None:
        target: Any = getattr(message, descriptor.name)
        for item in node.nodes if isinstance(node, Items) else [node]:
            place = f"{where}[{len(target)}]"
            self.positions[place] = item.position
            if descriptor.message_type is not None:
                self._fill_child(target.add(), item, place)
            else:
                target.append(self._scalar(descriptor, item, place))

    def _fill_map(self, message: Message, descriptor: Descriptor, node: Node, where: str) -> None:
        target: Any = getattr(message, descriptor.name)
        parts = descriptor.message_type.fields_by_name
        for key_node, value_node in self._map_entries(descriptor, node, where):
            key = self._scalar(parts["key"], key_node, where) if key_node is not None else _default_key(parts)
            place = f'{where}["{key}"]'
            position = key_node.position if key_node is not None else node.position
            if not self.is_text_format and key in target:
                raise ConfigError("given twice", position, field=place)
            self.positions[place] = position
            if parts["value"].message_type is not None:
                child = target[key]  # reading makes the entry
                if value_node is not None:
                    child.Clear()
                    self._fill_child(child, value_node, place)
            elif value_node is not None:
                target[key] = self._scalar(parts["value"], value_node, place)
            else:
                target[key] = parts["value"].default_value

    def _map_entries(
        self, descriptor: Descriptor, node: Node, where: str
    ) -> list[tuple[Node | None, Node | None]]:
        """Pairs of key and value. As objects in YAML and JSON; everywhere as {key, value} entries."""
        if isinstance(node, Fields) and not self.is_text_format:
            return [(Scalar(e.key, e.key, e.position, quoted=True), e.node) for e in node.entries]
        pairs: list[tuple[Node | None, Node | None]] = []
        for item in node.nodes if isinstance(node, Items) else [node]:
            if not isinstance(item, Fields):
                allowed = "entries with key and value"
                raise ConfigError(f"found {describe(item)}", item.position, field=where, allowed=allowed)
            given: dict[str, Node] = {}
            for entry in item.entries:
                self._find_field(descriptor.message_type, entry, where)
                given[entry.key] = entry.node
            pairs.append((given.get("key"), given.get("value")))
        return pairs

    def _scalar(self, descriptor: Descriptor, node: Node, where: str) -> Any:
        if isinstance(node, Items) and not self.is_text_format and len(node.nodes) == 1:
            node = node.nodes[0]
        value, allowed = (
            self._convert(descriptor, node) if isinstance(node, Scalar) else (None, _allowed(descriptor))
        )
        if value is None:
            nearest = ""
            if descriptor.enum_type is not None and isinstance(node, Scalar):
                nearest = _nearest_value(node.text, descriptor.enum_type)
            raise ConfigError(
                f"found {describe(node)}", node.position, field=where, allowed=allowed, nearest=nearest
            )
        return value

    def _convert(self, descriptor: Descriptor, node: Scalar) -> tuple[Any, str]:
        """The value, or None, and what is allowed."""
        allowed = _allowed(descriptor)
        if descriptor.type == FieldDescriptor.TYPE_ENUM:
            return self._enum(descriptor.enum_type, node), allowed
        if descriptor.type == FieldDescriptor.TYPE_STRING:
            is_text = node.quoted or not self.is_text_format
            return (node.text if is_text else None), allowed
        if node.quoted and self.is_text_format:
            return None, allowed
        if descriptor.type == FieldDescriptor.TYPE_BOOL:
            if self.is_text_format:
                return _TEXT_BOOLEANS.get(node.text), allowed
            return (node.value if isinstance(node.value, bool) else None), allowed
        if descriptor.type in INTEGER_RANGES:
            low, high = INTEGER_RANGES[descriptor.type]
            number = _integer(node, self.is_text_format)
            return (number if number is not None and low <= number <= high else None), allowed
        return _float(node), allowed

    def _enum(self, enum: Descriptor, node: Scalar) -> int | None:
        if isinstance(node.value, int) and not isinstance(node.value, bool):
            return node.value if node.value in enum.values_by_number else None
        if self.is_text_format:
            found = enum.values_by_name.get(node.text) if not node.quoted else None
            return found.number if found is not None else None
        wanted = node.text.lower()
        prefix = common_words([value.name for value in enum.values])
        for value in enum.values:
            if wanted in (value.name.lower(), value.name.removeprefix(prefix).lower()):
                return int(value.number)
        alias = enum.values_by_name.get(_ENUM_ALIASES.get(wanted, ""))
        return int(alias.number) if alias is not None else None


def build(message: M, root: Fields, *, is_text_format: bool) -> tuple[M, dict[str, Position]]:
    """Fills `message`; also gives where each given field stands. Raises ConfigError."""
    builder = Builder(is_text_format)
    builder.fill(message, root)
    return message, builder.positions


def common_words(names: list[str]) -> str:
    """TYPE_ of TYPE_FP32, TYPE_BOOL, …: the words that all values begin with; never a whole name."""
    first, *others = [name.split("_") for name in names]
    count = 0
    while count < len(first) - 1 and all(other[count : count + 1] == [first[count]] for other in others):
        count += 1
    return "".join(f"{word}_" for word in first[: count if others else min(count, 1)])


def _nearest_value(word: str, enum: Descriptor) -> str:
    names = [value.name for value in enum.values]
    prefix = common_words(names)
    short = nearest_match(word, [name.removeprefix(prefix) for name in names])
    return nearest_match(word, names) or (prefix + short if short else "")


def _is_map(descriptor: Descriptor) -> bool:
    return descriptor.message_type is not None and bool(descriptor.message_type.GetOptions().map_entry)


def _default_key(parts: Any) -> Any:
    return parts["key"].default_value


def _integer(node: Scalar, is_text_format: bool) -> int | None:
    if isinstance(node.value, bool):
        return None
    if isinstance(node.value, int):
        return node.value
    if isinstance(node.value, float) and node.value.is_integer() and not is_text_format:
        return int(node.value)
    if isinstance(node.value, str) and node.text.lstrip("-").isascii() and node.text.lstrip("-").isdigit():
        return int(node.text)
    return None


def _float(node: Scalar) -> float | None:
    if isinstance(node.value, bool):
        return None
    if isinstance(node.value, int | float):
        return float(node.value)
    if node.text.lower() in _FLOAT_WORDS:
        return _FLOAT_WORDS[node.text.lower()]
    try:
        return float(node.text) if node.text.isascii() and "_" not in node.text else None
    except ValueError:
        return None


def _allowed(descriptor: Descriptor) -> str:
    if descriptor.enum_type is not None:
        names = [value.name for value in descriptor.enum_type.values]
        return ", ".join(name for name in names if name != "TYPE_INVALID")
    if descriptor.type in INTEGER_RANGES:
        low, high = INTEGER_RANGES[descriptor.type]
        return f"an integer from {low} to {high}"
    if descriptor.type == FieldDescriptor.TYPE_BOOL:
        return "true, false"
    if descriptor.type == FieldDescriptor.TYPE_STRING:
        return "a quoted text"
    return "a number"
