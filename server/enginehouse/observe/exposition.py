"""Metrics as the text that Prometheus reads.

prometheus-client's own writer appends `_total` to every counter; the nv_* counters have names without it, so
this one writes a counter under the name that its samples have. Families of the same name are merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from prometheus_client.metrics_core import Metric

from enginehouse.types import MetricFamily

CONTENT_TYPE = "text/plain; charset=utf-8"
_KINDS = {"unknown": "untyped", "info": "gauge", "stateset": "gauge", "gaugehistogram": "histogram"}


class Labels(dict[str, str]):
    """Labels that are written again and again: as text they are made once."""

    __slots__ = ("_more", "_text")

    def __init__(self, labels: Mapping[str, str]) -> None:
        super().__init__(labels)
        self._text = ""
        self._more: dict[str, Labels] = {}

    @property
    def text(self) -> str:
        if not self._text:
            self._text = _labels_text(self)
        return self._text

    def bucket(self, bound: str) -> Labels:
        """The same with `le`."""
        found = self._more.get(bound)
        if found is None:
            found = self._more[bound] = Labels({**self, "le": bound})
        return found


def from_metric(metric: Metric) -> MetricFamily:
    """A prometheus-client metric, without its times of creation."""
    samples = [
        (sample.name.removeprefix(metric.name), sample.labels, sample.value)
        for sample in metric.samples
        if not sample.name.endswith("_created")
    ]
    return MetricFamily(metric.name, _KINDS.get(metric.type, metric.type), metric.documentation, samples)


def write(families: Iterable[MetricFamily]) -> bytes:
    """The text format, version 0.0.4. Families without samples are left out."""
    by_name: dict[str, list[MetricFamily]] = {}
    for family in families:
        if family.samples:
            by_name.setdefault(family.name, []).append(family)
    lines: list[str] = []
    for name, same in by_name.items():
        first = same[0]
        header = name + first.samples[0][0] if first.kind == "counter" else name
        lines.append(f"# HELP {header} {_escape(first.help)}\n# TYPE {header} {first.kind}")
        for family in same:
            lines += [f"{name}{suffix}{_text(labels)} {number(value)}" for suffix, labels, value in family.samples]
    return ("\n".join(lines) + "\n").encode() if lines else b""


def number(value: float) -> str:
    """Whole numbers without a point."""
    if isinstance(value, int):
        return str(int(value))
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _text(labels: Mapping[str, str]) -> str:
    return labels.text if isinstance(labels, Labels) else _labels_text(labels)


def _labels_text(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{_escape_label(value)}"' for key, value in labels.items()) + "}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _escape_label(text: str) -> str:
    return _escape(text).replace('"', '\\"')
