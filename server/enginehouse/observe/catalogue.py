"""Every family of metrics that a server can expose, as it really exposes it: for the dashboard and the docs.

A server with all of it switched on and one made-up model is asked; nothing here is a list by hand.
"""

from __future__ import annotations

from collections.abc import Iterable

from enginehouse.config.schema import ModelConfig, ModelTransactionPolicy
from enginehouse.observe.hosting_families import (
    SharedProcessReading,
    VersionReading,
    build_family,
    memory_families,
    shared_process_families,
    version_families,
)
from enginehouse.observe.metrics import CacheReading, Metrics
from enginehouse.observe.metrics_settings import MetricsSettings
from enginehouse.observe.system_families import GPU_FAMILIES
from enginehouse.types import MetricFamily


class _Booking:
    model, version, kind, num_bytes = "model", 1, "weights", 1


class _Device:
    device, total_bytes, limit_bytes, entries = "cpu", 1, 1, (_Booking(),)


def catalogue() -> list[MetricFamily]:
    """In the order of the exposition. Names are those of the families, `_total` not among them."""
    settings = MetricsSettings(gpu=False, histogram_latencies=True, summary_latencies=True)
    metrics = Metrics(settings)
    metrics.read_cache = CacheReading
    config = ModelConfig(name="model", model_transaction_policy=ModelTransactionPolicy(decoupled=True))
    for has_cache in (True, False):
        metrics.open_model(config, 1, has_cache=has_cache)
    metrics.add_provider(lambda: memory_families([_Device()]))
    metrics.add_provider(lambda: version_families([VersionReading("model", 1, is_ready=True, num_restarts=0)]))
    metrics.add_provider(lambda: shared_process_families([SharedProcessReading("process", 0, 0, 0)]))
    metrics.add_provider(lambda: [build_family("0")])
    metrics.add_provider(_gpu_families)
    found: dict[str, MetricFamily] = {}
    for family in metrics.families():
        if family.samples and not family.name.startswith("process_"):
            found.setdefault(family.name, family)
    return list(found.values())


def _gpu_families() -> Iterable[MetricFamily]:
    for name, kind, text in GPU_FAMILIES:
        yield MetricFamily(name, kind, text, [("", {"gpu_uuid": "GPU-0"}, 0)])


def labels_of(family: MetricFamily) -> list[str]:
    """Without those that belong to the kind: le and quantile."""
    return sorted({label for _, labels, _ in family.samples for label in labels} - {"le", "quantile"})
