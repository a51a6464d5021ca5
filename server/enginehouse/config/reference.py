"""The reference of all config fields, as Markdown: docs/configuration-reference.md is its output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from google.protobuf.descriptor import FieldDescriptor

from enginehouse.config.comments import comments
from enginehouse.config.schema import ModelConfig

# protobuf's stubs know two unrelated classes for each kind of descriptor
Descriptor: TypeAlias = Any

_HEAD = """# Every field of a model's config

Made by `enginehouse config reference` from `protos/model_config.proto`. How configs are written and found:
[configuration.md](configuration.md). `[x]` is a list, `{text: x}` a mapping.
"""
_WORDS = {
    FieldDescriptor.TYPE_BOOL: "true or false",
    FieldDescriptor.TYPE_STRING: "text",
    FieldDescriptor.TYPE_FLOAT: "number",
    FieldDescriptor.TYPE_DOUBLE: "number",
}


def reference() -> str:
    """One table for each message, in the order in which fields lead to them."""
    sections = [_HEAD]
    for message in _reachable(ModelConfig.DESCRIPTOR):
        name = _name(message)
        rows = [f"| `{field.name}` | {_type(field)} | {_meaning(name, field)} |" for field in message.fields]
        if rows:
            table = "\n".join(["| Field | Value | Meaning |", "|---|---|---|", *rows])
            sections.append("\n\n".join(part for part in (f"## {name}", comments().get(name), table) if part) + "\n")
    return "\n".join(sections)


def _reachable(root: Descriptor) -> Iterator[Descriptor]:
    waiting, seen = [root], {root.full_name}
    while waiting:
        message = waiting.pop(0)
        yield message
        for field in message.fields:
            target = _value_field(field).message_type
            if target is not None and target.full_name not in seen:
                seen.add(target.full_name)
                waiting.append(target)


def _name(message: Descriptor) -> str:
    return str(message.full_name.removeprefix("inference."))


def _value_field(field: Descriptor) -> Descriptor:
    """The field itself, or what a map holds."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return field.message_type.fields_by_name["value"]
    return field


def _type(field: Descriptor) -> str:
    value = _value_field(field)
    if value.message_type is not None:
        name = _name(value.message_type)
        word = f"[{name}](#{name.lower().replace('.', '')})" if value.message_type.fields else "`{}`"
    elif value.enum_type is not None:
        word = ", ".join(f"`{entry.name}`" for entry in value.enum_type.values if entry.name != "TYPE_INVALID")
    else:
        word = _WORDS.get(value.type, "integer")
    if value is not field:
        key = _WORDS.get(field.message_type.fields_by_name["key"].type, "integer")
        return f"{{{key}: {word}}}"
    return f"\\[{word}\\]" if field.is_repeated else word


def _meaning(message: str, field: Descriptor) -> str:
    text = comments().get(f"{message}.{field.name}", "").replace("|", "\\|")
    oneof = field.containing_oneof
    if oneof is not None and len(oneof.fields) > 1:
        others = " or ".join(f"`{other.name}`" for other in oneof.fields if other.name != field.name)
        text += f" Not beside {others}."
    return text
