"""Which scheduler a model gets: read from its config, once, when a version is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import NotFound, Unsupported
from enginehouse.execution.contract import InstanceHandle
from enginehouse.scheduling import test_hooks
from enginehouse.scheduling.clock import Clock, LoopClock
from enginehouse.scheduling.contract import ExecutionObserver, Scheduler, SubmitRequest
from enginehouse.scheduling.dynamic_batching import DynamicBatching, shape_key_of
from enginehouse.scheduling.ensemble import EnsembleScheduler
from enginehouse.scheduling.ensemble_check import ConfigLookup
from enginehouse.scheduling.loop import BatchingOptions, BatchingScheduler
from enginehouse.scheduling.queue import RequestQueue


def build_scheduler(
    config: ModelConfig,
    version: int,
    instances: Sequence[InstanceHandle],
    observer: ExecutionObserver,
    submit: SubmitRequest,
    *,
    lookup: ConfigLookup | None = None,
    clock: Clock | None = None,
) -> Scheduler:
    """The scheduler of one loaded version. Call on the server's loop.

    `submit` is the core's own and runs ensemble steps; `lookup(name, version)` gives the config of a ready
    model to them. Raises InvalidArgument or Unsupported, naming the config field.
    """
    clock = clock or LoopClock()
    if config.HasField("ensemble_scheduling"):
        return EnsembleScheduler(config, version, observer, submit, lookup or _no_lookup, clock)
    if config.HasField("sequence_batching"):
        raise Unsupported(f"model '{config.name}': sequence_batching is not supported yet")
    return BatchingScheduler(_batching_options(config), instances, observer, clock)


def _batching_options(config: ModelConfig) -> BatchingOptions:
    if not config.HasField("dynamic_batching"):
        return BatchingOptions()
    return BatchingOptions(
        policy=DynamicBatching.of(config),
        queue=RequestQueue.of(config.dynamic_batching),
        shape_key=shape_key_of(config),
        gathers=True,
        preserves_order=config.dynamic_batching.preserve_ordering,
        hold_until_queued=test_hooks.delay_scheduler(),
    )


def _no_lookup(name: str, version: str) -> ModelConfig:
    raise NotFound(f"Request for unknown model: '{name}' is not found")
