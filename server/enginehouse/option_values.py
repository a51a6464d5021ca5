"""What one flag's text means: each function turns it into a value or says what form was expected.

Pure: no environment, no files. The formats and the texts of the refusals are those that scripts written
for Triton look for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from enginehouse.errors import InvalidArgument


class OptionError(InvalidArgument):
    """A flag, variable or setting that can't be understood; the text is for the operator's terminal."""


E = TypeVar("E", bound=StrEnum)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """`<scope>,<key>=<value>`: scope is a backend, cache, host policy or trace mode; "" is global."""

    scope: str
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class RestrictedGroup:
    """These API groups answer only requests that carry the header `key` with `value`."""

    apis: tuple[str, ...]
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class RateLimitResource:
    """`device` -1: each device has `count` of it (or all share them where the model says global)."""

    name: str
    count: int
    device: int = -1


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """What the ledger may hand out on a device: bytes, or a fraction of what it has."""

    device: str
    num_bytes: int = 0
    fraction: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceValue:
    """`<device number>:<value>`."""

    device: int
    value: float


RESTRICTABLE_APIS = (
    "health", "metadata", "inference", "shared-memory", "model-config", "model-repository", "statistics",
    "trace", "logging",
)  # fmt: skip


def _with_form(form: str, parse: Callable[[str], T]) -> Callable[[str], T]:
    """For the usage: what the value looks like."""
    parse.form = form  # type: ignore[attr-defined]  # functions carry attributes; Callable can't say so
    return parse


def boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("true", "1", "on"):
        return True
    if lowered in ("false", "0", "off"):
        return False
    raise OptionError(f"invalid value for bool option: {text}")


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"Invalid option value. Got {text}") from None


def count(text: str) -> int:
    """An integer that can't be negative."""
    number = integer(text)
    if number < 0:
        raise OptionError(f"Provided option value is out of bound. Got {text}")
    return number


def at_least_one(flag: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = integer(text)
        if number <= 0:
            raise OptionError(f"Error: --{flag} must be greater than 0. Got {text}")
        return number

    return _with_form("integer", parse)


def grpc_threads(text: str) -> int:
    number = integer(text)
    if not 2 <= number <= 128:
        raise OptionError(f"invalid argument for --grpc_infer_thread_count. Must be in the range 2 to 128. Got {text}")
    return number


def config_name(value: str) -> str:
    if not value:
        raise OptionError("Error: empty argument for --model-config-name")
    return value


def port(text: str) -> int:
    """0 asks the system for a free one."""
    number = integer(text)
    if not 0 <= number <= 65535:
        raise OptionError(f"Provided option value is out of bound. Got {text}")
    return number


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"Invalid option value. Got {text}") from None


def verbosity(text: str) -> int:
    """Levels as numbers; true and false mean 1 and 0."""
    lowered = text.lower()
    return {"true": 1, "on": 1, "false": 0, "off": 0}[lowered] if lowered in _WORDS else count(text)


_WORDS = ("true", "on", "false", "off")


def text(value: str) -> str:
    return value


def choice(kind: type[E], flag: str) -> Callable[[str], E]:
    """A parser for the members of `kind`, whatever their case."""

    def parse(value: str) -> E:
        for member in kind:
            if member.value.lower() == value.lower():
                return member
        allowed = ", ".join(member.value for member in kind)
        raise OptionError(f"invalid argument for --{flag}, got: {value} (allowed: {allowed})")

    return _with_form("|".join(kind), parse)


def pattern(value: str) -> str:
    """A regular expression; refused here rather than at the first request."""
    try:
        re.compile(value)
    except re.error as error:
        raise OptionError(f"invalid regular expression {value!r}: {error}") from None
    return value


def setting(flag: str, what: str, scoped: bool | None = None) -> Callable[[str], Setting]:
    """`<what>,<key>=<value>`. `scoped` True demands the scope, False forbids it, None leaves it open."""
    form = "<setting>=<value>" if scoped is False else f"<{what}>,<setting>=<value>"
    got = f"{form}. Got " if scoped is False else f"'{form}'. Got "
    without_scope = f"{form}. Got " if scoped else f"{form} or <setting>=<value>. Got "
    expected = f"--{flag} option format is "

    def parse(value: str) -> Setting:
        head, equals, tail = value.partition("=")
        scope, comma, key = head.partition(",")
        if not comma:
            scope, key = "", head
        if not scope and (comma or scoped):
            raise OptionError(f"No {what.removesuffix(' name')} specified. {expected}{without_scope}{value}")
        if not equals or not key or not tail or (scoped is False and comma):
            raise OptionError(f"{expected}{got}{value}")
        return Setting(scope, key, tail)

    return _with_form(form.strip("<>").replace(">,<", ",").replace(">=<", "="), parse)


def restricted(flag: str, noun: str) -> Callable[[str], RestrictedGroup]:
    """`<api>,<api>:<header>=<value>`; `noun` is what the protocol calls a group of calls."""

    def parse(value: str) -> RestrictedGroup:
        names, colon, rest = value.partition(":")
        key, equals, secret = rest.partition("=")
        if not (names and colon and key and equals and secret):
            raise OptionError(f"--{flag} option format is '<config name>:<setting>=<value>'. Got {value}")
        apis = tuple(names.split(","))
        for api in apis:
            if api not in RESTRICTABLE_APIS:
                raise OptionError(f"unknown restricted {noun} '{api}' (there are: {', '.join(RESTRICTABLE_APIS)})")
        return RestrictedGroup(apis, key, secret)

    return _with_form(f"{noun},{noun}:key=value", parse)


def refuse_repeated_apis(groups: Sequence[RestrictedGroup], noun: str) -> None:
    seen: set[str] = set()
    for group in groups:
        for api in group.apis:
            if api in seen:
                raise OptionError(f"restricted {noun} '{api}' can not be specified in multiple config groups")
            seen.add(api)


def rate_limit_resource(value: str) -> RateLimitResource:
    parts = value.split(":")
    if not 2 <= len(parts) <= 3 or not parts[0]:
        raise OptionError(
            "--rate-limit-resource option format is '<resource_name>:<count>:<device>' or "
            f"'<resource_name>:<count>'. Got {value}"
        )
    return RateLimitResource(parts[0], count(parts[1]), integer(parts[2]) if len(parts) == 3 else -1)


def device_value(value: str) -> DeviceValue:
    device, colon, amount = value.partition(":")
    if not colon:
        raise OptionError(f"Cannot parse pair option. Expected <device>:<value>, got {value}")
    return DeviceValue(integer(device), number(amount))


def port_range(value: str) -> tuple[int, int]:
    low, dash, high = value.partition("-")
    if not dash:
        raise OptionError(f"Cannot parse pair option. Expected <low>-<high>, got {value}")
    return port(low), port(high)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def byte_size(value: str) -> int:
    """`1048576`, `512MB` (powers of 1000), `8GiB` (powers of 1024)."""
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise OptionError(f"Expected a size such as 1048576, 512MB or 8GiB, got {value}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


def memory_limit(value: str) -> MemoryLimit:
    """`cpu=8GiB`, `cuda:0=90%`."""
    device, equals, amount = value.rpartition("=")
    if not equals or not device:
        raise OptionError(f"--memory-limit option format is '<device>=<size>' or '<device>=<n>%'. Got {value}")
    if amount.endswith("%"):
        share = number(amount[:-1]) / 100
        if not 0 < share <= 1:
            raise OptionError(f"Provided option value is out of bound. Got {value}")
        return MemoryLimit(device, fraction=share)
    return MemoryLimit(device, num_bytes=byte_size(amount))


_LEADING_NUMBER = re.compile(r"\s*\d*\.?\d+")


def _leading_number(text: str) -> float:
    """What C reads of a number: trailing characters don't matter."""
    match = _LEADING_NUMBER.match(text)
    return number(match[0] if match else text)


def quantiles(value: str) -> tuple[tuple[float, float], ...]:
    """`0.5:0.05,0.9:0.01`: quantile and allowed error."""
    pairs = []
    for part in value.split(","):
        quantile, colon, error = part.partition(":")
        if not colon:
            raise OptionError(f"expected summary quantiles as <quantile>:<error>,<quantile>:<error>, got {value}")
        pairs.append((_leading_number(quantile), _leading_number(error)))
        if not (0 <= pairs[-1][0] <= 1 and 0 <= pairs[-1][1] <= 1):
            raise OptionError(f"quantile and error must be between 0 and 1, got {part}")
    return tuple(pairs)
