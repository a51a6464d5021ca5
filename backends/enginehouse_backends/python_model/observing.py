"""pb_utils.Logger and pb_utils.MetricFamily: what a model writes into the server's log and metrics."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from enginehouse.errors import EnginehouseError
from enginehouse_backends.python_model.context import running
from enginehouse_backends.python_model.errors import TritonModelException


class LogLevel:
    """Names of the levels, as the server knows them."""

    INFO: ClassVar[str] = "INFO"
    WARNING: ClassVar[str] = "WARNING"
    ERROR: ClassVar[str] = "ERROR"
    VERBOSE: ClassVar[str] = "VERBOSE"


class Logger:
    """All static; lines carry the place in the model that logged."""

    INFO = LogLevel.INFO
    WARNING = LogLevel.WARNING
    ERROR = LogLevel.ERROR
    VERBOSE = LogLevel.VERBOSE
    LogLevel = LogLevel

    @staticmethod
    def log(message: str, level: str = LogLevel.INFO) -> None:
        _log(level, message)

    @staticmethod
    def log_info(message: str) -> None:
        _log(LogLevel.INFO, message)

    @staticmethod
    def log_warn(message: str) -> None:
        _log(LogLevel.WARNING, message)

    @staticmethod
    def log_error(message: str) -> None:
        _log(LogLevel.ERROR, message)

    @staticmethod
    def log_verbose(message: str) -> None:
        _log(LogLevel.VERBOSE, message)


def _log(level: str, message: str) -> None:
    frame = sys._getframe(2)
    file = frame.f_code.co_filename.rpartition("/")[2]
    if running.services is None:
        print(f"{level} {file}:{frame.f_lineno}] {message}", file=sys.stderr)
    else:
        running.services.log(level, str(message), file, frame.f_lineno)


def _metric(operation: str, family: str, labels: Mapping[str, str], value: Any) -> Any:
    if running.services is None:
        raise TritonModelException("This model runs without a server: there are no metrics.")
    try:
        return running.services.metric(operation, family, labels, value)
    except EnginehouseError as problem:
        raise TritonModelException(str(problem)) from None


class MetricFamily:
    """A family of metrics under one name; models may share it."""

    COUNTER: ClassVar[str] = "counter"
    GAUGE: ClassVar[str] = "gauge"
    HISTOGRAM: ClassVar[str] = "histogram"

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name
        self.kind = kind
        _metric("family", name, {}, {"description": description, "kind": kind})

    def Metric(self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None) -> Metric:
        if buckets is not None and self.kind != self.HISTOGRAM:
            raise TritonModelException("Unexpected buckets found")
        return Metric(self, dict(labels or {}), buckets)

    def __del__(self) -> None:
        _remove("remove_family", getattr(self, "name", ""), {})


class Metric:
    """One metric of a family, by its labels. It goes with its last holder."""

    def __init__(self, family: MetricFamily, labels: Mapping[str, str], buckets: Sequence[float] | None) -> None:
        self._family = family
        self._labels = labels
        _metric("metric", family.name, labels, list(buckets) if buckets is not None else None)

    def increment(self, value: float) -> None:
        _metric("increment", self._family.name, self._labels, float(value))

    def set_value(self, value: float) -> None:
        _metric("set", self._family.name, self._labels, float(value))

    set = set_value

    def observe(self, value: float) -> None:
        _metric("observe", self._family.name, self._labels, float(value))

    def value(self) -> float:
        return float(_metric("value", self._family.name, self._labels, None))

    def __del__(self) -> None:
        if hasattr(self, "_labels"):
            _remove("remove_metric", self._family.name, self._labels)


def _remove(operation: str, family: str, labels: Mapping[str, str]) -> None:
    """At the end of a model or of the process there may be nobody left to tell."""
    if running.services is None or not running.is_executing_allowed or sys.is_finalizing():
        return
    try:
        running.services.metric(operation, family, labels, None)
    except EnginehouseError:
        return  # it went with the model already
