"""Metrics that models make themselves: families and metrics with labels, shared by name between models.

The kinds and the refusals are those of Triton's C and Python interfaces. On the server's loop; models reach
it through their Services.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from enginehouse.errors import AlreadyExists, InvalidArgument, NotFound, Unsupported
from enginehouse.types import MetricFamily

KINDS = ("counter", "gauge", "histogram")
Owner = tuple[str, int]
"""Model and version; what it made goes when it is unloaded."""
_FAMILY_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
LabelKey = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class CustomMetric:
    holders: Counter[Owner]
    """How often each made it: every instance of a model does, and the last one's removal counts."""
    value: float = 0.0
    bounds: tuple[float, ...] = ()
    counts: list[int] = field(default_factory=list)
    total: float = 0.0


@dataclass(slots=True)
class CustomFamily:
    kind: str
    help: str
    holders: Counter[Owner]
    metrics: dict[LabelKey, CustomMetric] = field(default_factory=dict)


class CustomMetrics:
    """All families that models made."""

    def __init__(self) -> None:
        self._families: dict[str, CustomFamily] = {}

    def call(
        self, model: str, version: int, operation: str, family: str, labels: Mapping[str, str], value: Any
    ) -> float | None:
        """What Services.metric does. Operations and their `value`:

        family {"description", "kind"} · metric [bucket bounds] or None · increment, set, observe: a number ·
        value: gives the number back · remove_metric · remove_family.

        Raises InvalidArgument, Unsupported, NotFound or AlreadyExists with the text that the model sees.
        """
        owner = (model, version)
        match operation:
            case "family":
                self.add_family(owner, family, str(value["description"]), str(value["kind"]))
            case "metric":
                self.add_metric(owner, family, labels, tuple(value or ()))
            case "increment":
                self.increment(family, labels, float(value))
            case "set":
                self.set(family, labels, float(value))
            case "observe":
                self.observe(family, labels, float(value))
            case "value":
                return self.value(family, labels)
            case "remove_metric":
                self._release_metric(owner, family, _key(labels))
            case "remove_family":
                self._release_family(owner, family)
            case _:
                raise InvalidArgument(f"unknown metric operation '{operation}'")
        return None

    def add_family(self, owner: Owner, name: str, help_text: str, kind: str) -> None:
        """Models may share a family if they agree on its kind."""
        kind = kind.lower()
        if not _FAMILY_NAME.fullmatch(name):
            raise InvalidArgument(f"'{name}' is no name for a metric family")
        if kind not in KINDS:
            raise InvalidArgument(f"metric kind '{kind}' of family '{name}' must be one of {', '.join(KINDS)}")
        known = self._families.setdefault(name, CustomFamily(kind, help_text, Counter()))
        if known.kind != kind:
            raise AlreadyExists(f"metric family '{name}' exists already as a {known.kind}, not a {kind}")
        known.holders[owner] += 1

    def add_metric(self, owner: Owner, family: str, labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        """The same labels again give the same metric."""
        known = self._family(family)
        for label in labels:
            if not _LABEL_NAME.fullmatch(label):
                raise InvalidArgument(f"'{label}' is no name for a label of metric family '{family}'")
        if known.kind == "histogram" and not bounds:
            raise InvalidArgument("histogram metrics need 'buckets'")
        if known.kind != "histogram" and bounds:
            raise Unsupported(f"a {known.kind} has no 'buckets'")
        if any(low >= high for low, high in pairwise(bounds)):
            raise InvalidArgument("'buckets' must be monotonically increasing")
        metric = known.metrics.get(_key(labels))
        if metric is None:
            metric = CustomMetric(Counter(), bounds=tuple(bounds), counts=[0] * (len(bounds) + 1))
            known.metrics[_key(labels)] = metric
        metric.holders[owner] += 1

    def increment(self, family: str, labels: Mapping[str, str], by: float) -> None:
        kind, metric = self._metric(family, labels)
        if kind == "histogram":
            raise Unsupported("TRITONSERVER_METRIC_KIND_HISTOGRAM does not support Increment")
        if kind == "counter" and by < 0:
            raise InvalidArgument(
                "TRITONSERVER_METRIC_KIND_COUNTER can only be incremented monotonically by non-negative values."
            )
        metric.value += by

    def set(self, family: str, labels: Mapping[str, str], value: float) -> None:
        kind, metric = self._metric(family, labels)
        if kind != "gauge":
            raise Unsupported(f"TRITONSERVER_METRIC_KIND_{kind.upper()} does not support Set")
        metric.value = value

    def observe(self, family: str, labels: Mapping[str, str], value: float) -> None:
        kind, metric = self._metric(family, labels)
        if kind != "histogram":
            raise Unsupported(f"TRITONSERVER_METRIC_KIND_{kind.upper()} does not support Observe")
        metric.counts[bisect_left(metric.bounds, value)] += 1
        metric.total += value

    def value(self, family: str, labels: Mapping[str, str]) -> float:
        kind, metric = self._metric(family, labels)
        if kind == "histogram":
            raise Unsupported("TRITONSERVER_METRIC_KIND_HISTOGRAM does not support Value")
        return metric.value

    def drop_owner(self, model: str, version: int) -> None:
        """The version is gone: what only it held goes too, however often it held it."""
        owner = (model, version)
        for name, family in list(self._families.items()):
            for key, metric in list(family.metrics.items()):
                del metric.holders[owner]
                if not metric.holders:
                    del family.metrics[key]
            del family.holders[owner]
            if not family.holders:
                del self._families[name]

    def families(self) -> Iterator[MetricFamily]:
        for name, family in self._families.items():
            samples: list[tuple[str, Mapping[str, str], float]] = []
            for key, metric in family.metrics.items():
                labels = dict(key)
                if family.kind != "histogram":
                    samples.append(("", labels, metric.value))
                    continue
                seen = 0
                for bound, count in zip([*metric.bounds, float("inf")], metric.counts, strict=True):
                    seen += count
                    shown = "+Inf" if bound == float("inf") else f"{bound:g}"
                    samples.append(("_bucket", {**labels, "le": shown}, seen))
                samples += [("_count", labels, seen), ("_sum", labels, metric.total)]
            yield MetricFamily(name, family.kind, family.help, samples)

    def _family(self, name: str) -> CustomFamily:
        if name not in self._families:
            raise NotFound(f"there is no metric family '{name}'")
        return self._families[name]

    def _metric(self, family: str, labels: Mapping[str, str]) -> tuple[str, CustomMetric]:
        known = self._family(family)
        if _key(labels) not in known.metrics:
            raise NotFound(f"there is no metric of family '{family}' with labels {dict(labels)}")
        return known.kind, known.metrics[_key(labels)]

    def _release_metric(self, owner: Owner, family: str, key: LabelKey) -> None:
        known = self._families.get(family)
        metric = known.metrics.get(key) if known else None
        if known is not None and metric is not None and _released(metric.holders, owner):
            del known.metrics[key]

    def _release_family(self, owner: Owner, name: str) -> None:
        known = self._families.get(name)
        if known is not None and _released(known.holders, owner):
            del self._families[name]


def _released(holders: Counter[Owner], owner: Owner) -> bool:
    """Takes one hold back; whether nobody holds it any more."""
    holders[owner] -= 1
    if holders[owner] <= 0:
        del holders[owner]
    return not holders


def _key(labels: Mapping[str, str]) -> LabelKey:
    return tuple(sorted((str(key), str(value)) for key, value in labels.items()))
