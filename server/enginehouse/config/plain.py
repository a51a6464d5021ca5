"""A message as plain dicts, lists and scalars: what the JSON and YAML spellings print."""

from __future__ import annotations

import base64
import math
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

# protobuf's stubs know two unrelated classes for each kind of descriptor
Field: TypeAlias = Any


def to_plain(message: Message, *, with_defaults: bool = False) -> dict[str, Any]:
    """Field names as in the protos, in their order; enums by name. 64-bit integers are integers.

    `with_defaults` also lists scalars, lists and maps that are not set, as Triton's answers do.
    """
    plain: dict[str, Any] = {}
    field: Field
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            if value or with_defaults:
                plain[field.name] = _repeated(field, value, with_defaults)
        elif field.has_presence:
            if message.HasField(field.name):
                plain[field.name] = _single(field, value, with_defaults)
        elif with_defaults or value != field.default_value or _is_minus_zero(value):
            plain[field.name] = _single(field, value, with_defaults)
    return plain


def _repeated(field: Field, value: Any, with_defaults: bool) -> Any:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        content = entry.fields_by_name["value"]
        return {_key(key): _single(content, value[key], with_defaults) for key in sorted(value)}
    return [_single(field, item, with_defaults) for item in value]


def _key(key: Any) -> str:
    return ("true" if key else "false") if isinstance(key, bool) else str(key)


def _single(field: Field, value: Any, with_defaults: bool) -> Any:
    match field.type:
        case FieldDescriptor.TYPE_MESSAGE:
            return to_plain(value, with_defaults=with_defaults)
        case FieldDescriptor.TYPE_ENUM:
            name = field.enum_type.values_by_number.get(value)
            return name.name if name is not None else value
        case FieldDescriptor.TYPE_BYTES:
            return base64.b64encode(value).decode()
        case FieldDescriptor.TYPE_FLOAT:
            return _number(float(str(np.float32(value))))
        case FieldDescriptor.TYPE_DOUBLE:
            return _number(value)
        case _:
            return value


def _number(value: float) -> float | int | str:
    """As protobuf's JSON writes it: 0 and not 0.0, and words for what JSON has no number for."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return int(value) if value.is_integer() and abs(value) < 1e15 and not _is_minus_zero(value) else value


def _is_minus_zero(value: Any) -> bool:
    return isinstance(value, float) and value == 0 and math.copysign(1, value) < 0
