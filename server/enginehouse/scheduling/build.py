"""Which scheduler a model gets: read from its config, once, when a version is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import NotFound
from enginehouse.execution.contract import InstanceHandle
from enginehouse.execution.padding import PaddingPlan
from enginehouse.scheduling import test_hooks
from enginehouse.scheduling.batch_rule import RuledBatching, load_rule
from enginehouse.scheduling.caching import CachingScheduler
from enginehouse.scheduling.clock import Clock, LoopClock
from enginehouse.scheduling.contract import ExecutionObserver, Scheduler, SubmitRequest
from enginehouse.scheduling.dynamic_batching import BatchPolicy, DynamicBatching, shape_key_of
from enginehouse.scheduling.ensemble import EnsembleScheduler
from enginehouse.scheduling.ensemble_check import ConfigLookup
from enginehouse.scheduling.ensemble_handover import HandsOver
from enginehouse.scheduling.fairness import FairQueue, Tenant
from enginehouse.scheduling.length_batching import LengthBatching
from enginehouse.scheduling.loop import BatchingOptions, BatchingScheduler
from enginehouse.scheduling.queue import RequestQueue, levels_of
from enginehouse.scheduling.rate_limiter import InstanceLimits, RateLimiter
from enginehouse.scheduling.response_cache import ResponseCache
from enginehouse.scheduling.sequence_batching import (
    DirectBatching,
    max_idle_ns_of,
    num_slots_of,
    oldest_batching,
)
from enginehouse.scheduling.sequence_controls import SequenceControls
from enginehouse.scheduling.sequence_lanes import SequenceOptions
from enginehouse.scheduling.sequence_loop import SequenceScheduler
from enginehouse.scheduling.sequence_requests import SequenceRequests
from enginehouse.scheduling.sequence_state import SequenceStates
from enginehouse.scheduling.tuning import BatchTuner, TunedBatching


def build_scheduler(
    config: ModelConfig,
    version: int,
    instances: Sequence[InstanceHandle],
    observer: ExecutionObserver,
    submit: SubmitRequest,
    *,
    lookup: ConfigLookup | None = None,
    model_directory: Path | None = None,
    rate_limiter: RateLimiter | None = None,
    cache: ResponseCache | None = None,
    fingerprint: str = "",
    clock: Clock | None = None,
    hands_over: HandsOver | None = None,
) -> Scheduler:
    """The scheduler of one loaded version. Call on the server's loop.

    `submit` is the core's own and runs ensemble steps; to them `lookup(name, version)` gives the config of a ready
    model, and `hands_over` which tensors need not leave a process. `model_directory` holds the files that the config
    names (initial states, batch rules). The rate limiter and the cache are the server's, or None; `fingerprint` tells
    the cache apart what the version holds now from what it held before. Raises InvalidArgument if something doesn't
    fit.
    """
    clock = clock or LoopClock()
    scheduler: Scheduler
    if config.HasField("ensemble_scheduling"):
        scheduler = EnsembleScheduler(config, version, observer, submit, lookup or _no_lookup, clock, hands_over)
    elif config.HasField("sequence_batching"):
        sequence_options = _sequence_options(config, model_directory)
        limits = _limits_of(config, instances, rate_limiter)
        scheduler = SequenceScheduler(sequence_options, instances, observer, clock, limits)
    else:
        options = _batching_options(config, model_directory)
        limits = _limits_of(config, instances, rate_limiter)
        scheduler = BatchingScheduler(options, instances, observer, clock, limits)
    if cache is None or not may_cache(config):
        return scheduler
    return CachingScheduler(
        scheduler,
        cache,
        observer,
        clock,
        model_name=config.name,
        version=version,
        fingerprint=fingerprint,
        preserves_order=config.dynamic_batching.preserve_ordering,
    )


def _limits_of(
    config: ModelConfig, instances: Sequence[InstanceHandle], rate_limiter: RateLimiter | None
) -> InstanceLimits | None:
    """Taken last of all: a version that can't be served must claim nothing."""
    return rate_limiter.limits_of(config, instances) if rate_limiter is not None else None


def may_cache(config: ModelConfig) -> bool:
    """Whether the config asks for it, and one request has one answer that depends on nothing else."""
    stateful = config.HasField("sequence_batching") or config.model_transaction_policy.decoupled
    return config.response_cache.enable and not stateful


def _batching_options(config: ModelConfig, model_directory: Path | None) -> BatchingOptions:
    if not config.HasField("dynamic_batching"):
        return BatchingOptions(queue=_queue_of(config))
    plan = PaddingPlan.of(config)
    policy, tuner = _policy_of(config, plan, model_directory)
    return BatchingOptions(
        policy=policy,
        queue=_queue_of(config),
        shape_key=shape_key_of(config, {one.name: one.axis for one in plan.inputs}),
        length_of=plan.length_of if plan else None,
        tuner=tuner,
        gathers=True,
        preserves_order=config.dynamic_batching.preserve_ordering,
        hold_until_queued=test_hooks.delay_scheduler(),
    )


def _policy_of(
    config: ModelConfig, plan: PaddingPlan, model_directory: Path | None
) -> tuple[BatchPolicy, BatchTuner | None]:
    """Whoever decides, and the tuner that it has, if it has one."""
    plain = DynamicBatching.of(config)
    place = config.serving.batching.rule
    if place:
        return RuledBatching(load_rule(place, model_directory), place, plain), None
    # which of the waiting requests join would change their order
    by_length = bool(plan) and not config.dynamic_batching.preserve_ordering
    policy = LengthBatching(plain, plan.target, plan.max_waste) if by_length else plain
    tuner = _tuner_of(config, plain.max_rows)
    return (policy, None) if tuner is None else (TunedBatching(policy, tuner), tuner)


def _tuner_of(config: ModelConfig, max_rows: int) -> BatchTuner | None:
    batching = config.serving.batching
    if not batching.target_p99_ms:
        return None
    target_s = batching.target_p99_ms / 1000
    max_delay_s = batching.max_delay_us / 1e6 if batching.max_delay_us else target_s
    return BatchTuner(target_s, min(batching.max_size or max_rows, max_rows), max_delay_s)


def _queue_of(config: ModelConfig) -> RequestQueue:
    levels = levels_of(config.dynamic_batching)
    if config.serving.tenants:
        return FairQueue([Tenant.of(tenant) for tenant in config.serving.tenants], *levels)
    return RequestQueue(*levels)


def _sequence_options(config: ModelConfig, model_directory: Path | None) -> SequenceOptions:
    batching = config.sequence_batching
    is_oldest = batching.HasField("oldest")
    return SequenceOptions(
        batching=oldest_batching(config) if is_oldest else DirectBatching.of(config),
        requests=SequenceRequests(
            config.name, SequenceControls(config), SequenceStates(config, model_directory), shape_key_of(config)
        ),
        num_slots=num_slots_of(config),
        max_idle_ns=max_idle_ns_of(config),
        preserves_order=is_oldest and batching.oldest.preserve_ordering,
        is_iterative=batching.iterative_sequence,
        hold=test_hooks.sequence_hold(is_oldest),
    )


def _no_lookup(name: str, version: str) -> ModelConfig:
    raise NotFound(f"Request for unknown model: '{name}' is not found")
