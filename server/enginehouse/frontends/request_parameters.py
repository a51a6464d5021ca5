"""Request parameters: which are the protocol's own, which are the model's, which nobody may use.

Also the rule by which headers of a request become parameters of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from enginehouse.errors import InvalidArgument
from enginehouse.frontends.json_values import (
    MAX_INT64,
    MIN_INT64,
    JsonTypeError,
    about,
    as_bool,
    as_members,
    as_string,
    as_unsigned,
)
from enginehouse.types import InferRequest, ParameterValue

RESERVED_PREFIX = "triton_"
EMPTY_FINAL = "triton_enable_empty_final_response"
FINAL = "triton_final_response"
_RESERVED_HEADERS = frozenset(
    ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output")
)


def request_text(request_id: str) -> str:
    """How messages of the core name a request."""
    return f"[request id: {request_id or '<id_unknown>'}] "


def set_parameters(request: InferRequest, parameters: Any) -> None:
    """Of a JSON body's `parameters`. `binary_data_output` is the codec's and skipped here.

    Raises JsonTypeError for a reserved key of the wrong type, InvalidArgument for what can't be passed on.
    """
    try:
        members = as_members(parameters)
    except JsonTypeError as error:
        raise about("failed to get request params.", error) from None
    for key, value in members.items():
        try:
            _set_parameter(request, key, value)
        except JsonTypeError as error:
            raise about(f"Unable to parse '{key}'", error) from None


def _set_parameter(request: InferRequest, key: str, value: Any) -> None:
    match key:
        case "sequence_id":
            request.correlation_id = value if _is_unsigned(value) else as_string(value)
        case "sequence_start":
            request.sequence_start = as_bool(value)
        case "sequence_end":
            request.sequence_end = as_bool(value)
        case "priority":
            request.priority = as_unsigned(value)
        case "timeout":
            request.timeout_us = as_unsigned(value)
        case "binary_data_output":
            as_bool(value)
        case _ if key.startswith(RESERVED_PREFIX):
            raise InvalidArgument(
                "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."
            )
        case _:
            request.parameters[key] = plain_parameter(key, value)


def _is_unsigned(value: Any) -> bool:
    return type(value) is int and value >= 0


def plain_parameter(key: str, value: Any) -> ParameterValue:
    """Strings, booleans and numbers; integers that no int64 holds become doubles."""
    if isinstance(value, (str, bool, float)):
        return value
    if isinstance(value, int):
        return value if MIN_INT64 <= value <= MAX_INT64 else float(value)
    raise InvalidArgument(f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or 'string'.")


class HeaderForwarding:
    """Headers in whose name the pattern is found become parameters and win over the body's."""

    def __init__(self, pattern: str) -> None:
        # `(?-i)` in front asks for exact case; Python spells that as a group around everything.
        exact = pattern.startswith("(?-i)")
        flags = 0 if exact else re.IGNORECASE
        self._pattern = re.compile(pattern.removeprefix("(?-i)"), flags) if pattern else None

    @property
    def is_on(self) -> bool:
        return self._pattern is not None

    def apply(self, request: InferRequest, headers: Iterable[tuple[str, str]]) -> None:
        if self._pattern is None:
            return
        for name, value in headers:
            if self._pattern.search(name) is None:
                continue
            if name.startswith(RESERVED_PREFIX) or name in _RESERVED_HEADERS:
                raise InvalidArgument(f"parameter key '{name}' is reserved for Triton usage and should not be a header")
            request.parameters[name] = value
