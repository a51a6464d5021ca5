"""A JSON Schema of config.yaml and config.json, for editors that complete and check while one types."""

from __future__ import annotations

from typing import Any, TypeAlias

from google.protobuf.descriptor import FieldDescriptor

from enginehouse.config.building import INTEGER_RANGES, common_words
from enginehouse.config.comments import comments
from enginehouse.config.schema import ModelConfig

# protobuf's stubs know two unrelated classes for each kind of descriptor
Descriptor: TypeAlias = Any
Schema: TypeAlias = dict[str, Any]


def json_schema() -> Schema:
    """Says the same as building.py does: short enum values, single items and single-field messages too."""
    definitions: dict[str, Schema] = {}
    _define(ModelConfig.DESCRIPTOR, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Enginehouse model config",
        "$ref": "#/$defs/ModelConfig",
        "$defs": definitions,
    }


def _define(message: Descriptor, definitions: dict[str, Schema]) -> Schema:
    """A reference to the message's definition, which is made if it is new."""
    name = message.full_name.removeprefix("inference.")
    if name not in definitions:
        definition: Schema = {"type": "object", "additionalProperties": False, "properties": {}}
        definitions[name] = definition
        if text := comments().get(name):
            definition["description"] = text
        for field in message.fields:
            definition["properties"][field.name] = _field(field, f"{name}.{field.name}", definitions)
        choices = [oneof for oneof in message.oneofs if len(oneof.fields) > 1]
        if choices:
            definition["allOf"] = [_at_most_one(oneof) for oneof in choices]
    return {"$ref": f"#/$defs/{name}"}


def _at_most_one(oneof: Descriptor) -> Schema:
    names = [field.name for field in oneof.fields]
    pairs = [[one, other] for index, one in enumerate(names) for other in names[index + 1 :]]
    return {"not": {"anyOf": [{"required": pair} for pair in pairs]}}


def _field(field: Descriptor, name: str, definitions: dict[str, Schema]) -> Schema:
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if is_map:
        value = field.message_type.fields_by_name["value"]
        schema: Schema = {"type": "object", "additionalProperties": _single(value, definitions)}
    elif field.is_repeated:
        item = _single(field, definitions)
        schema = {"anyOf": [{"type": "array", "items": item}, item]}
    else:
        schema = _single(field, definitions)
    text = comments().get(name)
    return {"description": text, **schema} if text else schema


def _single(field: Descriptor, definitions: dict[str, Schema]) -> Schema:
    message = field.message_type
    if message is None:
        return _scalar(field)
    reference = _define(message, definitions)
    if len(message.fields) == 1:
        return {"anyOf": [reference, _field(message.fields[0], "", definitions)]}
    return reference if message.fields else {"anyOf": [reference, {"const": True}]}


def _scalar(field: Descriptor) -> Schema:
    if field.enum_type is not None:
        names = [value.name for value in field.enum_type.values]
        prefix = common_words(names)
        short = [name.removeprefix(prefix).lower() for name in names] if prefix else []
        return {"enum": names + short}
    if field.type in INTEGER_RANGES:
        low, high = INTEGER_RANGES[field.type]
        return {"type": "integer", "minimum": low, "maximum": high}
    if field.type == FieldDescriptor.TYPE_BOOL:
        return {"type": "boolean"}
    if field.type == FieldDescriptor.TYPE_STRING:
        return {"type": ["string", "number", "boolean"]}
    return {"type": "number"}
