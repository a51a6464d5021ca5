"""Ways to spoil what was good: bytes, JSON documents, protobuf messages. Pure; all chance is in `dice`."""

from __future__ import annotations

import json
from random import Random
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1,
    2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**30, 0.0, -0.0, 0.5, 1e308, 5e-324, -1e308,
)  # fmt: skip
TEXTS = (
    "", " ", "\x00", "a", "IN", "OUT", "FP32", "BYTES", "INT32", "FP16", "BF16", "echo", "echo_text", "repeat", "tiny",
    "nope", "../..", "/etc/passwd", "%s%n", "true", "1", "-1", "é", "語", "\U0001f642", "\ud800", "a" * 300, "🙂" * 50,
    "binary_data", "shared_memory_region", "{}", "[]", "null", "triton_enable_empty_final_response", "id",
)  # fmt: skip
_SPOILT_JSON = (b"NaN", b"-Infinity", b"1e999", b"tru", b"'", b'"\\ud800"', b"\xff", b"{", b"]", b",", b"//", b"\x00")


def spoilt_bytes(dice: Random, data: bytes, times: int = 1) -> bytes:
    """Flips, inserts, deletes, repeats or cuts some bytes."""
    for _ in range(times):
        size = len(data)
        at = dice.randrange(size + 1)
        width = min(dice.choice((1, 1, 1, 2, 4, 16, 100)), size - at)
        way = dice.randrange(6)
        if way == 0 and at < size:
            data = data[:at] + bytes((data[at] ^ (1 << dice.randrange(8)),)) + data[at + 1 :]
        elif way == 1:
            data = data[:at] + dice.randbytes(dice.choice((1, 1, 2, 4, 30))) + data[at:]
        elif way == 2:
            data = data[:at] + data[at + width :]
        elif way == 3:
            data = data[:at] + data[at : at + width] * dice.choice((2, 2, 3, 50)) + data[at + width :]
        elif way == 4:
            data = data[:at]
        else:
            data = data[:at] + dice.choice(_SPOILT_JSON) + data[at:]
    return data


def some_value(dice: Random, depth: int = 0) -> Any:
    """Any JSON value, most of them where something else was expected."""
    way = dice.randrange(9 if depth < 4 else 6)
    if way < 2:
        return dice.choice(NUMBERS)
    if way < 4:
        return dice.choice(TEXTS)
    if way == 4:
        return dice.choice((None, True, False))
    if way == 5:
        return dice.choice(([], {}, [[]], [None], {"": {}}))
    if way == 6:
        return [some_value(dice, depth + 1) for _ in range(dice.randrange(5))]
    if way == 7:
        return {dice.choice(TEXTS): some_value(dice, depth + 1) for _ in range(dice.randrange(4))}
    nested: Any = 1
    for _ in range(dice.choice((3, 20, 99, 101, 300))):
        nested = [nested]
    return nested


def spoilt_json(dice: Random, document: Any, times: int = 1) -> bytes:
    """The document with some of its values replaced, moved, renamed or missing."""
    document = _copy(document)
    for _ in range(times):
        places = list(_places(document))
        if not places:
            document = some_value(dice)
            continue
        holder, key = dice.choice(places)
        way = dice.randrange(6)
        if way < 3:
            holder[key] = some_value(dice)
        elif way == 3:
            del holder[key]
        elif way == 4:
            other, other_key = dice.choice(places)
            holder[key] = _copy(other[other_key])
        elif isinstance(holder, dict):
            holder[dice.choice(TEXTS)] = holder.pop(key)
        else:
            holder.insert(key, some_value(dice))
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=dice.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    return value


def _places(value: Any) -> Any:
    """Every (holder, key or index) of the document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def spoil_message(dice: Random, message: Any, times: int = 1) -> None:
    """Sets, clears or repeats some fields of a protobuf message, somewhere in it."""
    for _ in range(times):
        target = message
        while dice.random() < 0.6:
            inner = _inner_messages(target)
            if not inner:
                break
            target = dice.choice(inner)
        if not target.DESCRIPTOR.fields:
            return
        field = dice.choice(target.DESCRIPTOR.fields)
        if dice.random() < 0.2:
            target.ClearField(field.name)
        else:
            _set_field(dice, target, field)


def _inner_messages(message: Any) -> list[Any]:
    found: list[Any] = []
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                found.extend(value.values())
        elif field.is_repeated:
            found.extend(value)
        else:
            found.append(value)
    return found


def _set_field(dice: Random, message: Any, field: Any) -> None:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        inner = field.message_type.fields_by_name["value"]
        key_field = field.message_type.fields_by_name["key"]
        key = _scalar(dice, key_field)
        if inner.message_type is not None:
            choices = inner.message_type.fields
            _set_field(dice, value[key], dice.choice(choices))
        else:
            value[key] = _scalar(dice, inner)
    elif field.is_repeated:
        for _ in range(dice.choice((1, 1, 2, 17))):
            if field.message_type is not None:
                value.add()
            else:
                value.append(_scalar(dice, field))
        if dice.random() < 0.3:
            del value[dice.randrange(len(value)) :]
    elif field.message_type is not None:
        value.SetInParent()
    else:
        setattr(message, field.name, _scalar(dice, field))


def _scalar(dice: Random, field: Any) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        text = dice.choice(TEXTS).encode("utf-8", "replace")
        return text if field.type == field.TYPE_BYTES else text.decode()
    if field.cpp_type == field.CPPTYPE_BOOL:
        return dice.random() < 0.5
    if field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return float(dice.choice((0, -1, 1.5, 1e30, float("nan"), float("inf"))))
    if field.cpp_type == field.CPPTYPE_ENUM:
        return dice.choice(field.enum_type.values).number
    number = int(dice.choice(NUMBERS))
    bits = 64 if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) else 32
    number %= 1 << bits
    is_signed = field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_INT32)
    return number - (1 << bits) if is_signed and number >> (bits - 1) else number
