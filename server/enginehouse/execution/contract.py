"""What the execution layer offers to those above: hosted models, their instances, and batches to run.

Everything here is called on the server's event loop and calls back on it, whatever thread or process the
instance lives in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from enginehouse.backend import LoadContext, Placement
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError
from enginehouse.execution.generations import Generations
from enginehouse.execution.joining import Joiner
from enginehouse.execution.patience import Progress
from enginehouse.types import GenerateRequest, InferRequest, InferResponse, MetricFamily, TokenEvent


@dataclass(frozen=True, slots=True)
class ExecutionTimes:
    """CLOCK_MONOTONIC nanoseconds of one batch: start ≤ input_end ≤ output_start ≤ end."""

    start_ns: int
    input_end_ns: int
    output_start_ns: int
    end_ns: int


@dataclass(slots=True, eq=False)
class Batch:
    """Requests that one instance runs together. Made by a scheduler, owned by execution until `on_done`.

    `on_response` is called in the model's order. Execution guarantees one final response for each request:
    if the instance fails or dies it makes the missing ones, with `reason` BACKEND. `on_done` is called once,
    when the instance is free again; for decoupled models that may be before the last response. Requests are
    what the model sees: control, state and padding tensors are already among their `inputs`.
    """

    requests: Sequence[InferRequest]
    on_response: Callable[[InferRequest, InferResponse], None]
    on_done: Callable[[Batch, ExecutionTimes, EnginehouseError | None], None]
    on_reschedule: Callable[[InferRequest], None] | None = None
    """Iterative sequences: instead of a final response, the model asks for the request once more."""
    instance: InstanceHandle | None = None
    context: Any = None
    """The scheduler's own."""


class InstanceHandle(Protocol):
    """One instance, wherever it lives. Runs one batch at a time (`num_slots` for those that stage)."""

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def group(self) -> int:
        """Index into the config's instance groups."""
        ...

    @property
    def num_slots(self) -> int: ...
    @property
    def available(self) -> bool:
        """False while its host is down or restarting: schedulers then hold or refuse requests."""
        ...

    def execute(self, batch: Batch) -> None: ...

    def cancel(self, request: InferRequest) -> None:
        """Tells a running model that nobody wants the answer (`is_cancelled`); the final still comes."""
        ...


class GenerativeHandle(Protocol):
    """An LLM's engine, wherever it lives."""

    def submit(self, request: GenerateRequest, emit: Callable[[TokenEvent], None]) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    @property
    def generations(self) -> Generations:
        """Those that are under way."""
        ...

    async def metrics(self) -> Sequence[MetricFamily]:
        """The engine's own metrics as they are now; nothing if its host is down."""
        ...


class ServerServices(Protocol):
    """What the server does for its models (BLS, logs, metrics); called on the loop. Core implements it."""

    def submit(self, request: InferRequest) -> None:
        """As core's: raises, or `request.sink` gets answers, one of them final."""
        ...

    async def load_model(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None: ...
    async def unload_model(self, name: str, unload_dependents: bool) -> None: ...
    def is_model_ready(self, name: str, version: str) -> bool: ...
    def is_decoupled(self, name: str, version: str) -> bool: ...
    def log(self, level: str, message: str, file: str, line: int) -> None: ...
    def metric(
        self, model: str, version: int, operation: str, family: str, labels: Mapping[str, str], value: Any
    ) -> Any: ...


class HostState(StrEnum):
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    """Gave up after too many crashes: UNAVAILABLE until loaded again."""


@dataclass(slots=True)
class HostHealth:
    state: HostState
    reason: str = ""
    num_restarts: int = 0


@dataclass(frozen=True, slots=True)
class Remains:
    """What could not be ended of a model that is closed: threads of this process whose calls don't return. They
    hold its memory, and the ledger shows that, until `gone` is done."""

    text: str
    gone: asyncio.Future[None]


class HostedModel(Protocol):
    """One loaded version. `config` is complete: autofilled and with instance groups made explicit."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def instances(self) -> Sequence[InstanceHandle]:
        """Without passive ones."""
        ...

    @property
    def generative(self) -> GenerativeHandle | None: ...
    @property
    def health(self) -> HostHealth: ...
    @property
    def joiner(self) -> Joiner: ...
    @property
    def shared_processes(self) -> Set[object]:
        """Processes where a tensor of its instances may stay for other models, and theirs for it."""
        ...

    @property
    def progress(self) -> Progress:
        """Counts the answers of its instances."""
        ...

    async def is_ready(self) -> bool:
        """The host is up and the model's own `is_ready`, where it has one, says so."""
        ...

    async def set_instances(self, placements: Sequence[Placement]) -> None:
        """Changes the instances in place; ones that go finish their batch first."""
        ...

    async def close(self) -> Remains | None:
        """After the last answer. Gives back every byte; the ledger's entries are gone when it returns, or once
        the remains are gone."""
        ...

    async def end(self, why: str) -> Remains | None:
        """As `close`, without waiting for what runs: it fails, and is told `why` ("was unloaded and …")."""
        ...


class Hosts(Protocol):
    """Loads models into hosts. One per server."""

    async def complete_config(self, context: LoadContext) -> ModelConfig:
        """The backend's `complete_config`, run where the model will live."""
        ...

    async def load(self, context: LoadContext, on_health: Callable[[HostHealth], None]) -> HostedModel:
        """Raises an EnginehouseError with the backend's reason; then nothing is left behind.

        `on_health` is called whenever the state or the availability of some instance has changed.
        """
        ...

    async def close(self) -> None: ...
    async def end(self, why: str) -> None:
        """As `close`, without waiting for what runs."""
        ...


@dataclass(frozen=True, slots=True)
class MemoryEntry:
    """A line of the ledger. `kind` is weights, workspace or kv; `measured` tells a reading from a claim."""

    model: str
    version: int
    device: str
    kind: str
    num_bytes: int
    measured: bool = False


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    device: str
    total_bytes: int
    limit_bytes: int
    entries: Sequence[MemoryEntry] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
