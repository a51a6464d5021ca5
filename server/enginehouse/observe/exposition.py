"""Metrics as the text that Prometheus reads.

prometheus-client's own writer appends `_total` to every counter; the nv_* counters have names without it, so
this one writes a counter under the name that its samples have. Families of the same name are merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from enginehouse.types import MetricFamily

CONTENT_TYPE = "text/plain; charset=utf-8"


def as_metric(family: MetricFamily) -> Metric:
    """The same for a prometheus-client registry."""
    metric = Metric(family.name, family.help, family.kind)
    metric.samples = [
        Sample(family.name + suffix, dict(labels), value) for suffix, labels, value in family.samples
    ]
    return metric


def write(metrics: Iterable[Metric]) -> bytes:
    """The text format, version 0.0.4. Families without samples are left out."""
    by_name: dict[str, tuple[Metric, list[Sample]]] = {}
    for metric in metrics:
        by_name.setdefault(metric.name, (metric, []))[1].extend(metric.samples)
    lines: list[str] = []
    for name, (metric, samples) in by_name.items():
        shown = [sample for sample in samples if not sample.name.endswith("_created")]
        if not shown:
            continue
        header = shown[0].name if metric.type == "counter" else name
        lines.append(f"# HELP {header} {_escape(metric.documentation)}")
        lines.append(f"# TYPE {header} {_TYPES.get(metric.type, metric.type)}")
        lines += [f"{each.name}{_labels(each.labels)} {number(each.value)}" for each in shown]
    return ("\n".join(lines) + "\n").encode() if lines else b""


_TYPES = {"unknown": "untyped", "info": "gauge", "stateset": "gauge", "gaugehistogram": "histogram"}


def number(value: float) -> str:
    """Whole numbers without a point."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{_escape_label(value)}"' for key, value in labels.items()) + "}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _escape_label(text: str) -> str:
    return _escape(text).replace('"', '\\"')
