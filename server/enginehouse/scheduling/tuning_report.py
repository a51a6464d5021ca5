"""What a tuner decided, as others see it: in the statistics, and as a config that freezes it. Pure."""

from __future__ import annotations

from enginehouse.config.schema import BatchTuning, ModelConfig, ModelStatistics
from enginehouse.scheduling.tuning import Tuning


def tuning_of(scheduler: object) -> Tuning | None:
    """Of any scheduler; None for those without a tuner."""
    tuning = getattr(scheduler, "tuning", None)
    return tuning if isinstance(tuning, Tuning) else None


def with_tuning(message: ModelStatistics, scheduler: object) -> ModelStatistics:
    """The message itself, with what the scheduler's tuner decided."""
    tuning = tuning_of(scheduler)
    if tuning is not None:
        message.tuning.CopyFrom(
            BatchTuning(
                max_batch_size=tuning.max_rows,
                queue_delay_us=tuning.delay_us,
                p99_ms=round(tuning.p99_ms, 3),
                arrivals_per_s=round(tuning.arrivals_per_s, 3),
                overhead_ms=round(tuning.overhead_ms, 3),
                row_ms=round(tuning.row_ms, 4),
            )
        )
    return message


def frozen_config(config: ModelConfig, tuning: Tuning) -> ModelConfig:
    """The config with the tuner's choice in Triton's own fields and the tuner off."""
    frozen = ModelConfig()
    frozen.CopyFrom(config)
    batching = frozen.dynamic_batching
    del batching.preferred_batch_size[:]
    batching.preferred_batch_size.append(tuning.max_rows)
    batching.max_queue_delay_microseconds = tuning.delay_us
    rule = frozen.serving.batching.rule
    frozen.serving.ClearField("batching")
    if rule:
        frozen.serving.batching.rule = rule
    return frozen
