"""Makes one version ready: completed config, host, scheduler, warm-up. And takes it down again.

The steps in order are `build`; what each one is lives in config, execution and scheduling.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from enginehouse.backend import LoadContext
from enginehouse.config import completion, tensors, validation
from enginehouse.config.labels import read_labels
from enginehouse.config.reading import print_config
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError, FailureReason, InvalidArgument, Unavailable
from enginehouse.execution.contract import GenerativeHandle, HostedModel, HostHealth, HostState, Remains
from enginehouse.execution.handover import may_hand_over
from enginehouse.execution.hosts import ModelHosts
from enginehouse.execution.patience import ends_in_time
from enginehouse.execution.placement import placements, with_explicit_groups
from enginehouse.observe.metrics import Metrics
from enginehouse.repository.definition import NAMESPACE_END, ModelDefinition, plain_name
from enginehouse.repository.registry import Registry, ServedVersion, VersionState
from enginehouse.request_checks import RequestChecks
from enginehouse.scheduling.build import build_scheduler, may_cache
from enginehouse.scheduling.contract import SubmitRequest
from enginehouse.scheduling.ensemble_check import check_ensemble
from enginehouse.scheduling.ensemble_handover import End
from enginehouse.scheduling.generative import GenerativeScheduler
from enginehouse.scheduling.rate_limiter import RateLimiter
from enginehouse.scheduling.response_cache import ResponseCache
from enginehouse.scheduling.tuning_report import frozen_config, tuning_of
from enginehouse.scheduling.warmup import warm_up

logger = logging.getLogger("enginehouse.repository")

METRICS_TIMEOUT_S = 5.0
"""An engine that takes longer to say how far it is gives no sign of life."""


class Serving:
    """lifecycle.VersionBuilder over the real hosts and schedulers. One per server."""

    def __init__(
        self,
        registry: Registry,
        hosts: ModelHosts,
        submit: SubmitRequest,
        *,
        metrics: Metrics,
        complete_configs: bool = True,
        rate_limiter: RateLimiter | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        self._registry = registry
        self._hosts = hosts
        self._submit = submit
        self._metrics = metrics
        self._complete_configs = complete_configs
        self._rate_limiter = rate_limiter
        self._cache = cache
        self._folders: dict[ServedVersion, Path] = {}
        self._engine_metrics: dict[int, Callable[[], None]] = {}

    async def build(self, definition: ModelDefinition, version: int) -> ServedVersion:
        """Raises an EnginehouseError; nothing of the version is left then."""
        context = LoadContext(definition.config, version, definition.directory)
        config = await self._complete(context)
        labels = await asyncio.to_thread(read_labels, config, definition.directory)
        served = self._describe(config, version, labels)
        served.keeper = definition.keeper
        hosted: HostedModel | None = None
        try:
            if not config.HasField("ensemble_scheduling"):
                hosted = await self._hosts.load(
                    LoadContext(config, version, definition.directory),
                    lambda health: self._note_health(served, health),
                )
                self._attach(served, hosted)
            await self._start(served, definition)
        except BaseException:
            await self._dismantle(served)
            raise
        return served

    async def retire(self, served: ServedVersion) -> Remains | None:
        patience_s = self._hosts.patience_s(served.config)
        hung = ""
        if not await ends_in_time(_drain(served), partial(_sign_of_life, served), patience_s):
            hung = f"was unloaded and answered nothing for {patience_s:g} s"
            logger.error("model '%s' version %s %s: it is ended", served.name, served.version, hung)
        await self._write_tuning(served)
        return await self._dismantle(served, hung)

    async def set_instances(self, served: ServedVersion, config: ModelConfig) -> None:
        """Changes instance groups in place: nothing is loaded anew, no request is lost."""
        changed = ModelConfig()
        changed.CopyFrom(served.config)
        del changed.instance_group[:]
        changed.instance_group.extend(config.instance_group)
        changed = with_explicit_groups(changed, self._hosts.machine)
        await served.hosted.set_instances(placements(changed, self._hosts.machine))
        served.config = changed
        served.scheduler.set_instances(served.hosted.instances)

    def check_ensemble(self, config: ModelConfig) -> None:
        """Raises InvalidArgument if its members are missing, or don't fit together."""
        for step in config.ensemble_scheduling.step:
            if step.model_version >= 0 and not self._registry.is_ready(step.model_name, str(step.model_version)):
                raise InvalidArgument(
                    f"ensemble '{config.name}' depends on '{step.model_name}' whose required version "
                    f"{step.model_version} is not loaded."
                )
        check_ensemble(config, self._config_of)

    def bytes_of(self, name: str) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for entry in self._hosts.ledger.entries(name):
            found[entry.device] = found.get(entry.device, 0) + entry.num_bytes
        return found

    # --- the steps of a build

    async def _complete(self, context: LoadContext) -> ModelConfig:
        """The config with what the artifact says filled in, checked as a whole."""
        config = context.config
        is_ensemble = config.HasField("ensemble_scheduling")
        if self._complete_configs and not is_ensemble:
            found = await self._hosts.complete_config(context)
            config = completion.merge_found(config, found)
        config = await asyncio.to_thread(completion.at_load, config, context.version_directory)
        if is_ensemble:
            config.model_transaction_policy.decoupled = check_ensemble(config, self._config_of)
        else:
            config = with_explicit_groups(config, self._hosts.machine)
        validation.validate_tensors(config)
        return config

    def _describe(self, config: ModelConfig, version: int, labels: Mapping[str, Sequence[str]]) -> ServedVersion:
        checks = RequestChecks(config)
        return ServedVersion(
            name=plain_name(config.name) if self._registry.has_namespaces else config.name,
            version=version,
            config=config,
            inputs={spec.name: spec for spec in tensors.request_inputs(config)},
            outputs={spec.name: spec for spec in tensors.request_outputs(config)},
            labels=labels,
            decoupled=config.model_transaction_policy.decoupled,
            checks=checks,
            reshapes_outputs=checks.reshapes_outputs,
            statistics=self._metrics.open_model(
                config,
                version,
                has_cache=self._cache is not None and may_cache(config),
                namespace=config.name.rpartition(NAMESPACE_END)[0] if self._registry.has_namespaces else "",
            ),
        )

    def _attach(self, served: ServedVersion, hosted: HostedModel) -> None:
        served.hosted = hosted
        served.config = hosted.config
        served.generative = hosted.generative is not None

    async def _start(self, served: ServedVersion, definition: ModelDefinition) -> None:
        instances = served.hosted.instances if served.hosted is not None else ()
        self._folders[served] = definition.directory
        if served.generative:
            served.scheduler = GenerativeScheduler(
                served.name, str(served.version), served.hosted.generative, served.statistics
            )
            self._engine_metrics[id(served)] = self._metrics.add_source(served.hosted.generative.metrics)
        else:
            served.scheduler = build_scheduler(
                served.config,
                served.version,
                instances,
                served.statistics,
                self._submit,
                lookup=self._config_of,
                hands_over=self._hands_over,
                model_directory=definition.directory,
                rate_limiter=self._rate_limiter,
                cache=self._cache,
                fingerprint=definition.fingerprints[served.version],
            )
        self._metrics.watch(
            served.statistics,
            lambda: served.scheduler.num_pending,
            lambda: len(served.hosted.instances) if served.hosted is not None else 1,
        )
        await warm_up(
            served.config, definition.directory, instances, served.statistics, served.checks.check
        )

    async def _write_tuning(self, served: ServedVersion) -> None:
        """What the tuner learnt outlives the model where the config asks for it."""
        tuning, folder = tuning_of(served.scheduler), self._folders.get(served)
        if tuning is None or folder is None or not tuning.p99_ms or not served.config.serving.batching.write_back:
            return
        path = folder / "configs" / "tuned.pbtxt"
        content = print_config(frozen_config(served.config, tuning), path.suffix)
        try:
            await asyncio.to_thread(write_whole, path, content)
            logger.info("wrote what the tuner of '%s' learnt to %s", served.name, path)
        except OSError as error:
            logger.error("can't write what the tuner of '%s' learnt to %s: %s", served.name, path, error)

    async def _dismantle(self, served: ServedVersion, hung: str = "") -> Remains | None:
        self._folders.pop(served, None)
        if (end_source := self._engine_metrics.pop(id(served), None)) is not None:
            end_source()
        if served.scheduler is not None:
            served.scheduler.close()
        remains: Remains | None = None
        if served.hosted is not None:
            remains = await (served.hosted.end(hung) if hung else served.hosted.close())
        self._metrics.close_model(served.statistics)
        return remains

    # --- what the host tells

    def _note_health(self, served: ServedVersion, health: HostHealth) -> None:
        served.healthy = health.state is HostState.READY
        logger.log(
            logging.INFO if served.healthy else logging.ERROR,
            "model '%s' version %s is %s%s",
            served.name,
            served.version,
            health.state.value,
            f": {health.reason}" if health.reason else "",
        )
        if served.scheduler is not None and served.hosted is not None:
            served.scheduler.set_instances(served.hosted.instances)
        if health.state is HostState.FAILED:
            self._give_up(served, health.reason)

    def _give_up(self, served: ServedVersion, reason: str) -> None:
        """Nobody will run what waits: it is answered now."""
        if self._serves(served):
            self._registry.set_state(served.key, served.version, VersionState.UNAVAILABLE, reason, served)
        if served.scheduler is not None:
            served.scheduler.close(
                lambda request: Unavailable(f"model '{served.name}' {reason}", reason=FailureReason.BACKEND)
            )

    def _serves(self, served: ServedVersion) -> bool:
        record = self._registry.models.get(served.key)
        entry = record.versions.get(served.version) if record is not None else None
        return entry is not None and entry.served is served

    def _hands_over(self, giver: End, taker: End) -> bool:
        """Whether an output of one model can stay in the process where the other one reads it."""
        try:
            source, target = (self._registry.find(name, version) for name, version, _ in (giver, taker))
        except EnginehouseError:
            return False
        return may_hand_over(source.hosted, giver[2], target.hosted, taker[2])

    def _config_of(self, name: str, version: str) -> ModelConfig:
        """Of a ready model, or of one that its next request loads again."""
        record = self._registry.models.get(name)
        if record is not None and record.on_demand and record.default is None and record.last_config is not None:
            return record.last_config
        return self._registry.find(name, version).config


async def _drain(served: ServedVersion) -> None:
    """Returns when nothing is in flight, generations that came past the scheduler included."""
    if served.scheduler is not None:
        await served.scheduler.drain()
    if served.generative:
        await served.hosted.generative.generations.ended()


async def _sign_of_life(served: ServedVersion) -> tuple[float, ...]:
    """Changes as long as the version works: with each answer, event, or token of an engine."""
    num_in_flight = served.scheduler.num_in_flight if served.scheduler is not None else 0
    if not served.generative:
        return (num_in_flight, served.hosted.progress.count if served.hosted is not None else 0)
    engine: GenerativeHandle = served.hosted.generative
    try:
        families = await asyncio.wait_for(engine.metrics(), METRICS_TIMEOUT_S)
    except (EnginehouseError, TimeoutError):
        families = []
    counted = [value for one in families if one.kind == "counter" for _, _, value in one.samples]
    return (num_in_flight, engine.generations.num_events, *counted)


def write_whole(path: Path, content: str) -> None:
    """So that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(content, encoding="utf-8")
    part.replace(path)
