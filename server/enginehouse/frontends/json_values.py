"""Reading JSON bodies with the types, and the complaints, of the v2 protocol.

rapidjson because NaN, Infinity, big integers and the texts of syntax errors then come out as clients know
them. What a value may be is checked where it is read, as the texts name the reader's expectation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson
import rapidjson

from enginehouse.errors import Internal, InvalidArgument
from enginehouse.frontends.http_message import Buffer

MAX_UINT64 = 2**64 - 1
MIN_INT64, MAX_INT64 = -(2**63), 2**63 - 1
MAX_NESTING = 100
_LARGE_BYTES = 64 << 10

_SYNTAX = re.compile(r"Parse error at offset (\d+): (.*)", re.DOTALL)


def parse_json(body: Buffer) -> Any:
    """Raises Internal (500 in this protocol) for what is no JSON."""
    if len(body) >= _LARGE_BYTES:
        # A fourth of the time, for what strict JSON has; the rest, and the complaints, are the other one's.
        with suppress(orjson.JSONDecodeError):
            return orjson.loads(body)
    return _parse(rapidjson.loads, body)


def _parse(read: Callable[[bytes], Any], body: Buffer) -> Any:
    try:
        return read(body if isinstance(body, bytes) else bytes(body))
    except rapidjson.JSONDecodeError as error:
        # Of bytes that are UTF-8 this only says that a control character stands in a string.
        text = str(error).replace("Invalid encoding in string", "Invalid escape character in string")
        raise _syntax_error(text) from None
    except UnicodeDecodeError as error:
        return _refuse_encoding(read, body, error.start)
    except RecursionError:
        raise nesting_error() from None


def _refuse_encoding(read: Callable[[bytes], Any], body: Buffer, start: int) -> Any:
    """Up to there it may be complete, or wrong; a control character is as wrong in a string as bad UTF-8."""
    try:
        return read(bytes(body[:start]) + b"\x01")
    except rapidjson.JSONDecodeError as error:
        raise _syntax_error(str(error)) from None
    except RecursionError:
        raise nesting_error() from None


class Members(list[tuple[str, Any]]):
    """An object whose names may repeat: its members in order."""


class _MembersDecoder(rapidjson.Decoder):
    def start_object(self) -> Members:
        return Members()


_decode_members = _MembersDecoder()


def parse_json_members(body: Buffer) -> Any:
    """As `parse_json`, with `Members` where it has dicts."""
    return _parse(_decode_members, body)


def nesting_error() -> InvalidArgument:
    return InvalidArgument(f"JSON nesting depth exceeds maximum allowed limit ({MAX_NESTING})")


def _syntax_error(text: str) -> Internal:
    match = _SYNTAX.fullmatch(text)
    return Internal(f"failed to parse the request JSON buffer: {f'{match[2]} at {match[1]}' if match else text}")


class JsonTypeError(Internal):
    """A value of another type than the reader needs."""


def missing(name: str) -> JsonTypeError:
    return JsonTypeError(f"attempt to access non-existing object member '{name}'")


def member(value: Any, name: str) -> Any:
    if isinstance(value, dict) and name in value:
        return value[name]
    raise missing(name)


def as_string(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise JsonTypeError("attempt to access JSON non-string as string")


def as_array(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    raise JsonTypeError("attempt to access JSON non-array as array")


def as_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise JsonTypeError("attempt to access JSON non-boolean as boolean")


def as_unsigned(value: Any) -> int:
    if type(value) is int and 0 <= value <= MAX_UINT64:
        return value
    raise JsonTypeError("attempt to access JSON non-unsigned-integer as unsigned-integer")


def as_signed(value: Any) -> int:
    if type(value) is int and MIN_INT64 <= value <= MAX_INT64:
        return value
    raise JsonTypeError("attempt to access JSON non-signed-integer as signed-integer")


def as_members(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise JsonTypeError("attempt to get members for non-object")


def about(prefix: str, error: JsonTypeError) -> JsonTypeError:
    """The same complaint, saying first which field was read."""
    return JsonTypeError(f"{prefix}: {error}")
