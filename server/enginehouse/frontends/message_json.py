"""A protobuf message as plain values, the way Triton prints configs and statistics: every field, defaults
included (absent messages left out), original names, 64-bit integers as numbers."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message


def message_to_json(message: Message) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            document[field.name] = _repeated(field, value)
        elif field.has_presence:
            if message.HasField(field.name):
                document[field.name] = _single(field, value)
        else:
            document[field.name] = _single(field, value)
    return document


def _repeated(field: Any, value: Any) -> Any:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        of = entry.fields_by_name["value"]
        return {str(key): _single(of, value[key]) for key in value}
    return [_single(field, item) for item in value]


def _single(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return message_to_json(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        return int(value)  # as protobuf's own JSON writes them
    return value
