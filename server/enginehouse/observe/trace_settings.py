"""What is traced: the server's defaults, what was set for all models, what was set for one; field by field.

Pure. A field that was set for a model beats one set for all, which beats the flags; null (or an empty list over
gRPC) takes a setting back. Texts of refusals are Triton's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntFlag, StrEnum
from typing import Any

from enginehouse.errors import Internal, InvalidArgument, Unsupported
from enginehouse.option_values import OptionError, integer
from enginehouse.options import ServerOptions


class TraceMode(StrEnum):
    TRITON = "triton"
    OPENTELEMETRY = "opentelemetry"


class TraceLevel(IntFlag):
    OFF = 0
    TIMESTAMPS = 1
    TENSORS = 2

    @property
    def names(self) -> list[str]:
        return [level.name for level in (TraceLevel.TIMESTAMPS, TraceLevel.TENSORS) if level & self and level.name] or [
            "OFF"
        ]


@dataclass(frozen=True, slots=True)
class TraceValues:
    """One in `rate` requests is traced; `count` more of them, -1 without end; `log_frequency` a file."""

    level: TraceLevel = TraceLevel.OFF
    rate: int = 1000
    count: int = -1
    log_frequency: int = 0
    file: str = ""

    def problem(self, mode: TraceMode) -> str:
        """Why nothing can be traced so; empty if it can or if tracing is off."""
        if self.level is TraceLevel.OFF:
            return ""
        if self.rate == 0:
            return "sample rate must be non-zero"
        return "trace file name is not given" if mode is TraceMode.TRITON and not self.file else ""


@dataclass(frozen=True, slots=True)
class TraceDefaults:
    """What the flags say. `exporter` are OpenTelemetry's settings in the order of the flags."""

    values: TraceValues = TraceValues()
    mode: TraceMode = TraceMode.TRITON
    exporter: Mapping[str, str] = field(default_factory=dict)
    resource: Mapping[str, str] = field(default_factory=dict)


Change = Mapping[str, Any]
"""TraceValues' fields that are set anew; None takes a setting back."""
_UINT32 = 0xFFFFFFFF
_INT32 = 0x7FFFFFFF
_BATCHING = {"bsp_max_queue_size": "2048", "bsp_schedule_delay": "5000", "bsp_max_export_batch_size": "512"}
DEFAULT_URL = "http://localhost:4318/v1/traces"


# --- flags


def defaults_from_options(options: ServerOptions) -> TraceDefaults:
    """--trace-config beats the deprecated --trace-* flags; level OFF beats all others. Raises OptionError."""
    values = TraceValues(
        rate=1000 if options.trace_rate is None else options.trace_rate,
        count=-1 if options.trace_count is None else options.trace_count,
        log_frequency=options.trace_log_frequency or 0,
        file=options.trace_file,
    )
    levels = [_level_of_flag(each) for each in options.trace_level]
    mode = TraceMode.TRITON
    exporter: dict[str, str] = {}
    resource: dict[str, str] = {}
    for setting in options.trace_config:
        match setting.scope.lower(), setting.key:
            case "", "level":
                levels.append(_level_of_flag(setting.value))
            case "", "rate":
                values = replace(values, rate=integer(setting.value))
            case "", "count":
                values = replace(values, count=integer(setting.value))
            case "", "mode":
                mode = _mode_of_flag(setting.value)
            case TraceMode.TRITON, "file":
                values = replace(values, file=setting.value)
            case TraceMode.TRITON, "log-frequency":
                values = replace(values, log_frequency=integer(setting.value))
            case TraceMode.OPENTELEMETRY, "resource":
                key, _, value = setting.value.partition("=")
                resource[key] = value
            case (
                TraceMode.OPENTELEMETRY,
                "url" | "bsp_max_queue_size" | "bsp_schedule_delay" | "bsp_max_export_batch_size",
            ):
                exporter[setting.key] = setting.value
            case scope, key:
                raise OptionError(f"--trace-config has no setting '{f'{scope},' if scope else ''}{key}'")
    level = TraceLevel.OFF
    if TraceLevel.OFF not in levels:
        for each in levels:
            level |= each
    if mode is TraceMode.OPENTELEMETRY:
        exporter = {"url": DEFAULT_URL, **_BATCHING, **exporter}
    return TraceDefaults(replace(values, level=level), mode, exporter, resource)


def _level_of_flag(text: str) -> TraceLevel:
    match text.lower():
        case "false" | "off":
            return TraceLevel.OFF
        case "true" | "on" | "min" | "max" | "timestamps":
            return TraceLevel.TIMESTAMPS
        case "tensors":
            return TraceLevel.TENSORS
    raise OptionError(f"invalid value for trace level option: {text}")


def _mode_of_flag(text: str) -> TraceMode:
    if text.lower() in list(TraceMode):
        return TraceMode(text.lower())
    raise OptionError(
        f'invalid value for trace mode option: {text}. Available options are "triton" and "opentelemetry"'
    )


# --- requests


def change_from_json(document: Mapping[str, Any]) -> Change:
    """An HTTP update: all values are strings but trace_level, a list of them. Unknown keys are ignored."""
    if "trace_file" in document:
        raise Unsupported("trace file location can not be updated through network protocol")
    change: dict[str, Any] = {}
    if "trace_level" in document:
        levels = document["trace_level"]
        if levels is None:
            change["level"] = None
        elif not isinstance(levels, list):
            raise Internal("attempt to access JSON non-array as array")
        else:
            _set_levels(change, [_json_string(each) for each in levels])
    for key, (name, parse) in _NUMBERS.items():
        if key in document:
            value = document[key]
            change[name] = None if value is None else parse(key, _json_string(value), "got:")
    return change


def change_from_grpc(settings: Mapping[str, Sequence[str]]) -> Change:
    """A gRPC update: lists of strings; an empty one takes the setting back. Unknown keys are ignored."""
    if "trace_file" in settings:
        raise Unsupported("trace file location can not be updated through network protocol")
    change: dict[str, Any] = {}
    if "trace_level" in settings:
        if settings["trace_level"]:
            _set_levels(change, settings["trace_level"])
        else:
            change["level"] = None
    for key, (name, parse) in _NUMBERS.items():
        if key not in settings:
            continue
        values = settings[key]
        if len(values) > 1:
            raise InvalidArgument(f"expect only 1 value for '{key}'")
        change[name] = parse(key, values[0], "got: ") if values else None
    return change


def _json_string(value: object) -> str:
    if not isinstance(value, str):
        raise Internal("attempt to access JSON non-string as string")
    return value


def _set_levels(change: dict[str, Any], names: Sequence[str]) -> None:
    """Names that there are not are ignored; a list of nothing else changes nothing."""
    level = TraceLevel.OFF
    for name in names:
        if name == "OFF":
            if len(names) > 1:
                raise InvalidArgument("Expect only one trace level 'OFF' is specified")
            change["level"] = TraceLevel.OFF
        elif name in ("TIMESTAMPS", "TENSORS"):
            level |= TraceLevel[name]
            change["level"] = level


_LEADING_NUMBER = re.compile(r"\s*([+-]?\d+)")


def _number(key: str, text: str, low: int, high: int) -> int:
    """What C's conversion would read: leading digits count, the rest doesn't matter."""
    match = _LEADING_NUMBER.match(text)
    if match is None:
        raise InvalidArgument(f"Unable to parse '{key}', got: {text}")
    number = int(match[1])
    if not -_INT32 - 1 <= number <= _INT32:
        raise InvalidArgument(f"Unable to parse '{key}', value is out of range [ {low}, {high} ], got: {text}")
    return number


def _unsigned(key: str, text: str, got: str) -> int:
    return _number(key, text, 0, _UINT32) & _UINT32


def _count(key: str, text: str, got: str) -> int:
    number = _number(key, text, -1, _INT32)
    if number < -1:
        raise InvalidArgument(f"Unable to parse '{key}'. Expecting value >= -1, {got}{text}")
    return number


_NUMBERS: dict[str, tuple[str, Callable[[str, str, str], int]]] = {
    "trace_rate": ("rate", _unsigned),
    "trace_count": ("count", _count),
    "log_frequency": ("log_frequency", _unsigned),
}


# --- the layers


class TraceLayers:
    """Defaults, what is set for all models, what is set for one."""

    def __init__(self, defaults: TraceDefaults) -> None:
        self.defaults = defaults
        self._for_all: dict[str, Any] = {}
        self._for_model: dict[str, dict[str, Any]] = {}

    def values(self, model: str = "") -> TraceValues:
        return replace(self.defaults.values, **{**self._for_all, **self._for_model.get(model, {})})

    @property
    def models(self) -> list[str]:
        """Those with settings of their own."""
        return list(self._for_model)

    def update(self, model: str, change: Change) -> None:
        """For all models if `model` is empty. Raises InvalidArgument for what could not be traced."""
        before = self._for_model.get(model, {}) if model else self._for_all
        after = {key: value for key, value in {**before, **change}.items() if value is not None}
        base = {**self._for_all, **after} if model else after
        if problem := replace(self.defaults.values, **base).problem(self.defaults.mode):
            raise InvalidArgument(f"Attempting to set invalid trace setting :{problem}")
        if not model:
            self._for_all = after
        elif after:
            self._for_model[model] = after
        else:
            self._for_model.pop(model, None)
