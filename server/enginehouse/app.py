"""Composition root: builds the parts, starts them, listens to signals, drains. No logic of its own.

Front ends listen before models are loaded, so that metrics and the index tell how far a long start is; live
and ready say no until it is done. On SIGTERM it says so first, goes on serving, then stops listening, then waits.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from enginehouse import __version__
from enginehouse.core import Core
from enginehouse.errors import EnginehouseError
from enginehouse.execution.backends import installed_backends
from enginehouse.execution.hosts import ModelHosts, host_options
from enginehouse.frontends.cloud.vertex_ai import vertex_ai_problem
from enginehouse.frontends.serving import FrontEnd, front_ends
from enginehouse.observe.hosting_families import (
    build_family,
    memory_families,
    shared_process_families,
    version_families,
)
from enginehouse.observe.logs import LogSettings, ServerLogging, escaping_wanted, unescaped
from enginehouse.observe.metrics import CacheReading, Metrics
from enginehouse.observe.metrics_settings import MetricsSettings
from enginehouse.observe.tables import backends_table, models_table, server_table
from enginehouse.observe.tracing import TraceSettings
from enginehouse.options import ModelControlMode, RateLimitMode, ServerOptions
from enginehouse.repository.agents import Agents
from enginehouse.repository.lifecycle import Lifecycle
from enginehouse.repository.readings import shared_process_readings, version_readings
from enginehouse.repository.registry import Registry, ServedVersion
from enginehouse.repository.serving import Serving
from enginehouse.repository.source import Repositories
from enginehouse.repository.storage import open_root
from enginehouse.repository.watching import follow
from enginehouse.scheduling.caches import make_cache
from enginehouse.scheduling.rate_limiter import RateLimiter
from enginehouse.scheduling.response_cache import ResponseCache

logger = logging.getLogger("enginehouse.app")

GIL_SWITCH_INTERVAL_S = 0.0005
"""Other people's native backends hold the GIL: the loop gets it back this fast (IPC measurements)."""

IDLE_LOOK_INTERVAL_S = 1.0
_IN_FLIGHT_LOOK_S = 0.05
HOSTS_GRACE_S = 3.0
"""For what is still in hosts when everything else is down; workers die with the server anyhow."""


class StartFailed(Exception):
    """The server can't start; the text is what follows "error: " on stderr."""


class Server:
    """The parts of one server, put together."""

    def __init__(self, options: ServerOptions, logs: ServerLogging) -> None:
        self.options = options
        self.registry = Registry(has_namespaces=options.model_namespacing)
        self.metrics = Metrics(MetricsSettings.from_options(options))
        self.core = Core(
            self.registry,
            options=options,
            tracing=TraceSettings.of(options),
            logs=logs.settings,
            metrics=self.metrics,
        )
        self.hosts = ModelHosts(self.core, host_options(options))
        self.source = Repositories(
            [open_root(root, download_directory=options.download_directory) for root in options.model_repository],
            variant=options.model_config_name,
            complete_configs=options.complete_configs,
            agents=Agents(Path(options.repoagent_directory) if options.repoagent_directory else None),
            has_namespaces=options.model_namespacing,
        )
        self.cache = make_cache(options.caches, options.cache_directory)
        if self.cache is not None:
            self.metrics.read_cache = partial(_cache_reading, self.cache)
        self.serving = Serving(
            self.registry,
            self.hosts,
            self.core.submit,
            metrics=self.metrics,
            complete_configs=options.complete_configs,
            rate_limiter=_rate_limiter(options),
            cache=self.cache,
        )
        self.lifecycle = Lifecycle(
            self.registry,
            self.source,
            self.serving,
            num_parallel_loads=options.model_load_thread_count,
            num_retries=options.model_load_retry_count,
        )
        self.core.lifecycle = self.lifecycle
        self.core.source = self.source
        self.metrics.add_provider(lambda: memory_families(self.hosts.ledger.budgets()))
        self.metrics.add_provider(lambda: version_families(version_readings(self.registry)))
        self.metrics.add_provider(lambda: shared_process_families(shared_process_readings(self.hosts)))
        self.metrics.add_provider(lambda: [build_family(__version__)])
        self._front_ends: Sequence[FrontEnd] = ()
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Raises StartFailed; then nothing is left running."""
        try:
            self._front_ends = front_ends(self.core, self.options)
        except EnginehouseError as error:
            raise StartFailed(error.message) from error
        for front_end in self._front_ends:
            await _started(front_end)
        try:
            problems = await self._load_models()
        except StartFailed as failure:
            if self.options.exit_on_error:
                raise
            logger.error("%s", str(failure).removeprefix("creating server: ").replace(" - ", ": ", 1))
            self.core.never_starts = True
            return
        if problems:
            for name, problem in problems.items():
                logger.error("%s: %s", name, problem)
            if self.options.exit_on_error:
                raise StartFailed("creating server: Internal - failed to load all models")
        if self.options.allow_vertex_ai:
            problem = vertex_ai_problem(self.core, self.options.vertex_ai_default_model)
            if problem:
                raise StartFailed(problem)
        self.core.started = True
        for table in self._tables():
            logger.info(table, extra=unescaped())
        if self.options.model_control_mode is ModelControlMode.POLL:
            following = follow(
                self.source.watched_folders,
                self.lifecycle,
                settle_s=self.options.repository_settle_ms / 1000,
                poll_s=self.options.repository_poll_secs,
            )
            self._watchers.append(asyncio.create_task(following, name="watch repositories"))
        self._watchers.append(asyncio.create_task(self._unload_idle(), name="unload idle models"))

    def _tables(self) -> list[str]:
        """What Triton prints when it has started."""
        index = [(entry.name, entry.version, entry.state, entry.reason) for entry in self.core.index()]
        return [
            backends_table(installed_backends(), self.options),
            models_table(index),
            server_table(self.options, self.core.server_version, self.core.extensions),
        ]

    async def stop(self) -> None:
        """Not ready first; then what was accepted is answered; then everything is given back."""
        self.core.draining = True
        if self.options.drain_delay_secs:
            await asyncio.sleep(self.options.drain_delay_secs)
        for watcher in self._watchers:
            watcher.cancel()
        logger.info("Waiting for in-flight requests to complete.")
        self.core.stopping = True
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self.options.exit_timeout_secs
        await self._finish_inferences(end_s)
        await asyncio.gather(*(front_end.stop(end_s - loop.time()) for front_end in self._front_ends))
        close_hosts = self.hosts.close
        try:
            await asyncio.wait_for(self._take_down(end_s), end_s - loop.time())
        except TimeoutError:
            logger.error("Exit timeout expired. Exiting immediately.")
            close_hosts = partial(self.hosts.end, "was stopped with the server")
        try:
            await asyncio.wait_for(close_hosts(), HOSTS_GRACE_S)
        except TimeoutError:
            logger.error("A model's process doesn't end: it is killed with the server.")
        if self.cache is not None:
            await self.cache.close()
        self.core.tracing.close()
        self.metrics.close()

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(IDLE_LOOK_INTERVAL_S)
            await self.lifecycle.unload_idle()

    async def _finish_inferences(self, end_s: float) -> None:
        """Returns when no request and no sequence is left, or it is too late."""
        loop = asyncio.get_running_loop()
        next_word_s = loop.time()
        while (now_s := loop.time()) < end_s:
            busy = {served: count for served in self.registry.all_ready() if (count := _num_unfinished(served))}
            if now_s >= next_word_s or not busy:
                next_word_s += 1.0
                left_s = round(end_s - now_s)
                logger.info("Timeout %s: Found %s model versions that have in-flight inferences", left_s, len(busy))
                for served, count in busy.items():
                    logger.info(
                        "Model '%s' (version %s) has %s in-flight inferences", served.name, served.version, count
                    )
            if not busy:
                return
            await asyncio.sleep(_IN_FLIGHT_LOOK_S)

    async def _take_down(self, end_s: float) -> None:
        closing = asyncio.ensure_future(self.lifecycle.close())
        loop = asyncio.get_running_loop()
        while not closing.done():
            left_s, live = round(end_s - loop.time()), self.lifecycle.num_live
            logger.info("Timeout %s: Found %s live models and 0 in-flight non-inference requests", left_s, live)
            await asyncio.wait([closing], timeout=1.0)

    async def _load_models(self) -> dict[str, str]:
        if not self.options.model_repository:
            raise StartFailed("creating server: Invalid argument - --model-repository must be specified")
        missing = [root for root in self.options.model_repository if "://" not in root and not Path(root).is_dir()]
        if missing:
            raise StartFailed(f"creating server: Internal - failed to stat file {missing[0]}")
        try:
            names = await asyncio.to_thread(self.source.names)
        except EnginehouseError as error:
            raise StartFailed(f"creating server: {error.code.value} - {error}") from error
        wanted = [key for name in self._names_at_start(names) for key in self.source.keys_of(name)]
        lazy = [name for name in wanted if await asyncio.to_thread(self.source.is_on_demand, name)]
        for name in lazy:
            self.lifecycle.list_on_demand(name)
        return await self.lifecycle.load_all([name for name in wanted if name not in set(lazy)])

    def _names_at_start(self, names: Sequence[str]) -> list[str]:
        if self.options.model_control_mode is not ModelControlMode.EXPLICIT:
            return list(names)
        if "*" in self.options.load_model:
            return list(names)
        return list(self.options.load_model)


def _log_settings(options: ServerOptions) -> LogSettings:
    return LogSettings(
        info=options.log_info,
        warning=options.log_warning,
        error=options.log_error,
        verbose_level=options.log_verbose,
        format_name=options.log_format.value,
        file=options.log_file,
        escape=escaping_wanted(os.environ),
    )


def _rate_limiter(options: ServerOptions) -> RateLimiter | None:
    if options.rate_limit is RateLimitMode.OFF:
        return None
    return RateLimiter({(one.name, one.device): one.count for one in options.rate_limit_resource})


def _cache_reading(cache: ResponseCache) -> CacheReading:
    counts = cache.counts
    return CacheReading(
        num_entries=cache.num_entries,
        num_lookups=counts.num_lookups,
        num_hits=counts.num_hits,
        num_misses=counts.num_misses,
        num_evictions=counts.num_evictions,
        lookup_us=counts.lookup_ns // 1000,
        insertion_us=counts.insertion_ns // 1000,
        utilization=cache.utilization,
    )


def _num_unfinished(served: ServedVersion) -> int:
    """Requests, or sequences that their clients may go on with: as Triton counts them."""
    return int(served.scheduler.num_sequences or served.scheduler.num_in_flight)


async def _started(front_end: FrontEnd) -> None:
    try:
        await front_end.start()
    except EnginehouseError as error:
        raise StartFailed(error.message) from error


async def _serve(options: ServerOptions, logs: ServerLogging) -> tuple[int, bool]:
    """The exit status, and whether threads are left that don't end."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    try:
        server = Server(options, logs)
    except EnginehouseError as error:
        print(f"error: creating server: {error.code.value} - {error}", file=sys.stderr, flush=True)
        return 1, False
    starting = asyncio.ensure_future(server.start())
    told = asyncio.ensure_future(stopping.wait())
    await asyncio.wait([starting, told], return_when=asyncio.FIRST_COMPLETED)
    status = 0
    if starting.done() and (problem := starting.exception()) is not None:
        if not isinstance(problem, StartFailed):
            raise problem
        print(f"error: {problem}", file=sys.stderr, flush=True)
        status = 1
    else:
        await told
        starting.cancel()
    await server.stop()
    return (1, True) if server.hosts.has_remains else (status, False)


def run(options: ServerOptions) -> int:
    """Serves until SIGTERM or SIGINT. Gives back the exit status."""
    import uvloop

    sys.setswitchinterval(GIL_SWITCH_INTERVAL_S)
    for line in options.warnings:
        print(line, file=sys.stderr)
    try:
        logging_to = ServerLogging(_log_settings(options))
    except EnginehouseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with logging_to as logs:
        status, has_remains = uvloop.run(_serve(options, logs))
    if has_remains:  # native code that still runs would have the interpreter's end be an abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
