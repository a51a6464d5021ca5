"""Which metrics are wanted: --allow-*-metrics and --metrics-config, understood once at the start."""

from __future__ import annotations

from dataclasses import dataclass

from enginehouse.option_values import OptionError, boolean, quantiles
from enginehouse.options import ServerOptions

DEFAULT_QUANTILES = ((0.5, 0.05), (0.9, 0.01), (0.95, 0.001), (0.99, 0.001), (0.999, 0.001))
SETTINGS = ("counter_latencies", "histogram_latencies", "summary_latencies", "summary_quantiles")


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """`quantiles` are pairs of quantile and allowed error; ours are always within half a percent."""

    gpu: bool = True
    cpu: bool = True
    interval_ms: float = 2000.0
    counter_latencies: bool = True
    histogram_latencies: bool = False
    summary_latencies: bool = False
    quantiles: tuple[tuple[float, float], ...] = DEFAULT_QUANTILES
    pinned_pool_bytes: int = 0
    response_statistics: bool = False

    @classmethod
    def from_options(cls, options: ServerOptions) -> MetricsSettings:
        """Raises OptionError for settings that there are not."""
        values = {setting.key: setting.value for setting in options.metrics_config}
        for key in values:
            if key not in SETTINGS:
                raise OptionError(
                    f"unknown --metrics-config setting '{key}' (there are: {', '.join(SETTINGS)})"
                )
        return cls(
            gpu=options.allow_gpu_metrics,
            cpu=options.allow_cpu_metrics,
            interval_ms=options.metrics_interval_ms,
            counter_latencies=boolean(values.get("counter_latencies", "true")),
            histogram_latencies=boolean(values.get("histogram_latencies", "false")),
            summary_latencies=boolean(values.get("summary_latencies", "false")),
            quantiles=quantiles(values["summary_quantiles"])
            if "summary_quantiles" in values
            else DEFAULT_QUANTILES,
            pinned_pool_bytes=options.pinned_memory_pool_byte_size,
            response_statistics=options.response_statistics,
        )
