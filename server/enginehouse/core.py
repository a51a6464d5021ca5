"""The one front door: every front end, ensemble step and BLS call comes through here.

Finds the ready version, checks the tensors against the config, stamps times, and hands the request to the
version's scheduler. Knows nothing of any protocol.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from enginehouse import __version__
from enginehouse.errors import (
    EnginehouseError,
    FailureReason,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from enginehouse.observe.logs import log_for_model
from enginehouse.repository.definition import Override
from enginehouse.repository.lifecycle import Lifecycle
from enginehouse.repository.registry import DUPLICATE, IndexEntry, Registry, ServedVersion, VersionState
from enginehouse.scheduling.in_flight import stopped
from enginehouse.scheduling.tuning_report import with_tuning
from enginehouse.types import GenerateRequest, InferRequest, InferResponse, TokenEvent

__all__ = ["Core", "IndexEntry", "ServedVersion"]

logger = logging.getLogger("enginehouse.core")

EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "cuda_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)


class Core:
    """See module. All methods are called on the server's loop and never block it.

    `submit` and what it calls are the way of every request; the rest is control. `tracing`, `logs`,
    `metrics` and `options` are there for front ends that expose them.
    """

    def __init__(self, registry: Registry, *, options: Any, tracing: Any, logs: Any, metrics: Any) -> None:
        self.registry = registry
        self.lifecycle: Lifecycle | None = None
        """Set by app before the first load: lifecycle and core need each other."""
        self.source: Any = None
        self.options = options
        self.tracing = tracing
        self.logs = logs
        self.metrics = metrics
        self.server_name: str = options.id
        self.server_version: str = __version__
        self.extensions: Sequence[str] = EXTENSIONS
        self.started = False
        self.draining = False
        self.stopping = False
        """Clients get no new inference, and may end the sequences that they have begun."""
        self.never_starts = False
        """The start failed and the server stays, to say so (--exit-on-error=false)."""
        self._waiting_for_load: dict[str, list[InferRequest]] = {}

    # --- health

    def is_live(self) -> bool:
        """Not before the models of the start are loaded: scripts written for Triton, which doesn't listen
        until then, take the first "live" as the sign to begin."""
        return self.started

    def is_ready(self) -> bool:
        """Not while starting or draining; with strict readiness only if every model is."""
        if not self.started or self.draining:
            return False
        return not self.options.strict_readiness or self.registry.all_settled_ready()

    def is_model_ready(self, name: str, version: str = "") -> bool:
        """Raises InvalidArgument for a version that is no number. Unknown models are not ready.

        A model that its first request loads is ready: it can be asked.
        """
        if self.registry.is_ready(name, version):
            return True
        record = self.registry.models.get(self.registry.resolve(name))
        return record is not None and record.on_demand and record.default is None and not version

    async def model_answers_ready(self, name: str, version: str = "") -> bool:
        """As `is_model_ready`, and the model's own `is_ready`, where it has one, agrees."""
        if not self.is_model_ready(name, version):
            return False
        if not self.registry.is_ready(name, version):
            return True
        hosted = self.registry.find(name, version).hosted
        return True if hosted is None else bool(await hosted.is_ready())

    # --- models

    def model(self, name: str, version: str = "") -> ServedVersion:
        """Raises NotFound for an unknown model or version, Unavailable for one that is not ready."""
        return self.registry.find(name, version)

    def model_now(self, name: str, version: str = "") -> ServedVersion | None:
        """As `loaded_model`, or None where that would wait or raise."""
        try:
            return self.registry.find(name, version)
        except EnginehouseError:
            return None

    async def loaded_model(self, name: str, version: str = "") -> ServedVersion:
        """As `model`; loads a model that is to be loaded on demand."""
        self._check_started()
        if self._must_load(name):
            # A client that goes away must not leave a model half loaded.
            await asyncio.shield(self._lifecycle.load(self.registry.resolve(name)))
        return self.registry.find(name, version)

    def why_unready(self, name: str) -> str:
        """Why no version of the model can be asked; "" if one can, or if there is no such model."""
        key = self.registry.resolve(name)
        unread = "" if self.lifecycle is None else self.lifecycle.poll_failure(key)
        return self.registry.why_unready(key) or unread

    def index(self, repository: str = "", ready_only: bool = False) -> list[IndexEntry]:
        self._check_started()
        duplicates = self.source.known_duplicates()
        names = [name for name in self.source.known_names() if name not in duplicates]
        refused = [IndexEntry(name, "", VersionState.UNAVAILABLE.value, DUPLICATE) for name in sorted(duplicates)]
        return self.registry.index(names, ready_only) + refused

    async def load(
        self, name: str, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Raises Unavailable where the control mode forbids it."""
        self._check_started()
        self._check_control()
        override = Override(config, files or {}) if config is not None or files else None
        for key in await self._keys_of(name):
            # A client that goes away must not leave a model half loaded.
            await asyncio.shield(self._lifecycle.load(key, override))

    async def unload(self, name: str, unload_dependents: bool = False) -> None:
        self._check_started()
        self._check_control()
        for key in await self._keys_of(name):
            await asyncio.shield(self._lifecycle.unload(key, unload_dependents))

    async def _keys_of(self, name: str) -> list[str]:
        """With namespaces a name may mean several models."""
        if not self.registry.has_namespaces:
            return [name]
        found: list[str] = await asyncio.to_thread(self.source.keys_of, name)
        return found

    def statistics(self, name: str = "", version: str = "") -> list[Any]:
        """inference.ModelStatistics messages. Raises InvalidArgument if there is no such ready model."""
        self._check_started()
        if not name:
            served: Iterable[ServedVersion] = self.registry.all_ready()
        elif not (ready := self.registry.ready_versions(name)):
            raise InvalidArgument(f"requested model '{name}' is not available")
        elif not version:
            served = ready
        else:
            try:
                served = [self.registry.find(name, version)]
            except (NotFound, Unavailable):
                raise InvalidArgument(
                    f"requested model version is not available for model '{name}'"
                ) from None
        return [with_tuning(one.statistics.message(), one.scheduler) for one in served]

    # --- inference

    def submit_for_client(self, request: InferRequest) -> None:
        """As `submit`, for a request from outside: refused once the server stops, unless it goes on with a sequence.

        What models and ensembles ask for in the name of accepted requests is still answered then.
        """
        if self.stopping and (not request.correlation_id or request.sequence_start):
            raise stopped(request)
        self.submit(request)

    def submit(self, request: InferRequest) -> None:
        """Checks and accepts, or raises; then `request.sink` gets answers on the loop, one of them final."""
        assert request.sink is not None, "a request without a sink: a bug of the caller"
        try:
            served = self.registry.find(request.model_name, request.model_version)
        except NotFound:
            if not self._must_load(request.model_name):
                raise
            self._hold_until_loaded(request)
            return
        self._submit_to(served, request)

    def _submit_to(self, served: ServedVersion, request: InferRequest) -> None:
        served.checks.check(request)
        if not served.healthy:
            raise Unavailable(
                f"model '{served.name}' version {served.version} is restarting: {served.hosted.health.reason}",
                reason=FailureReason.OTHER,
            )
        if not request.tenant and "tenant" in request.parameters:
            request.tenant = str(request.parameters["tenant"])
        served.last_used_ns = time.monotonic_ns()
        if request.trace is not None:
            request.trace.follow(request, served.version)
        if served.reshapes_outputs:
            request.sink = served.checks.reshaping_sink(request.sink)
        try:
            served.scheduler.submit(request)
        except EnginehouseError as error:
            served.statistics.on_refusal(error)
            raise

    def _must_load(self, name: str) -> bool:
        record = self.registry.models.get(self.registry.resolve(name))
        return record is not None and record.on_demand and record.default is None

    def _hold_until_loaded(self, request: InferRequest) -> None:
        """Keeps the request while its model loads; the first one starts the load."""
        name = self.registry.resolve(request.model_name)
        waiting = self._waiting_for_load.get(name)
        if waiting is not None:
            waiting.append(request)
            return
        self._waiting_for_load[name] = [request]
        task = asyncio.create_task(self._load_for_waiting(name), name=f"load {name} on demand")
        task.add_done_callback(_log_failure)

    async def _load_for_waiting(self, name: str) -> None:
        problem: EnginehouseError | None = None
        try:
            await self._lifecycle.load(name)
        except EnginehouseError as error:
            problem = error
        except Exception as error:  # whatever it is, those who wait are answered
            logger.exception("loading '%s' on demand broke", name)
            problem = Internal(f"loading '{name}' broke: {error!r}")
        for request in self._waiting_for_load.pop(name):
            assert request.sink is not None, "checked by submit"
            try:
                if problem is not None:
                    raise problem
                if request.cancelled:
                    raise Unavailable(
                        "request was cancelled while its model was loading", reason=FailureReason.CANCELED
                    )
                self._submit_to(self.registry.find(name, request.model_version), request)
            except EnginehouseError as error:
                request.sink(InferResponse(error=error, model_name=name, id=request.id))

    async def infer(self, request: InferRequest) -> InferResponse:
        """For models with one answer. Sets the sink itself. Raises the response's error; a cancelled task
        cancels the request. Unsupported for a decoupled model: use `stream`."""
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()

        def answer(response: InferResponse) -> None:
            if not future.done() and (response.final or response.has_response):
                future.set_result(response)

        request.sink = answer
        self.submit_for_client(request)
        try:
            response = await future
        except asyncio.CancelledError:
            request.cancel()
            raise
        if response.error is not None:
            raise response.error
        return response

    async def stream(self, request: InferRequest) -> AsyncIterator[InferResponse]:
        """Every answer, errors included (in `error`), the final one last. Leaving early cancels."""
        answers: deque[InferResponse] = deque()
        arrived = asyncio.Event()

        def answer(response: InferResponse) -> None:
            answers.append(response)
            arrived.set()

        request.sink = answer
        self.submit_for_client(request)
        finished = False
        try:
            while not finished:
                await arrived.wait()
                arrived.clear()
                while answers:
                    response = answers.popleft()
                    finished = response.final
                    yield response
        finally:
            if not finished:
                request.cancel()

    # --- generation

    def generate(self, request: GenerateRequest, emit: Callable[[TokenEvent], None]) -> None:
        """To an LLM's engine. Raises Unsupported for a model that is none."""
        if self.stopping:
            raise Unavailable("Server is stopping, no new generation is accepted")
        self._engine_of(request.model_name).submit(request, emit)

    def cancel_generate(self, model_name: str, request_id: str) -> None:
        self._engine_of(model_name).cancel(request_id)

    def _engine_of(self, name: str) -> Any:
        served = self.registry.find(name)
        if served.hosted is None or served.hosted.generative is None:
            raise Unsupported(f"model '{name}' does not generate text: it is no language model")
        if not served.healthy:
            raise Unavailable(f"model '{name}' is restarting: {served.hosted.health.reason}")
        return served.hosted.generative

    # --- what models ask for (execution.contract.ServerServices)

    async def load_model(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None:
        await self.load(name, config, files)

    async def unload_model(self, name: str, unload_dependents: bool) -> None:
        await self.unload(name, unload_dependents)

    def is_decoupled(self, name: str, version: str) -> bool:
        return self.registry.find(name, version).decoupled

    def log(self, level: str, message: str, file: str, line: int) -> None:
        log_for_model(level, message, file, line)

    def metric(
        self, model: str, version: int, operation: str, family: str, labels: Mapping[str, str], value: Any
    ) -> Any:
        return self.metrics.custom.call(model, version, operation, family, labels, value)

    # --- control

    @property
    def _lifecycle(self) -> Lifecycle:
        assert self.lifecycle is not None, "app sets the lifecycle before anything is asked: a bug"
        return self.lifecycle

    def _check_started(self) -> None:
        if self.never_starts:
            raise Unavailable("Server not ready")

    def _check_control(self) -> None:
        if self.options.model_control_mode.value != "explicit":
            raise Unavailable("explicit model load / unload is not allowed if polling is enabled")


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("loading on demand broke", exc_info=task.exception())
