"""The plug-in contract: a Backend makes Models, a Model makes Instances, an Instance runs batches.

The same three objects live in a thread of the server, in a process of their own or in a device's process;
a backend can't tell and need not care. Found by the entry point group `enginehouse.backends`. See
docs/write-a-backend.md. One instance runs one batch at a time; several instances run side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Protocol

from enginehouse.config.schema import ModelConfig
from enginehouse.types import GenerateRequest, InferRequest, MetricFamily, Tensor, TokenEvent


class HostKind(StrEnum):
    """Where instances live: this process, a process of the model's own, the process of a device."""

    THREAD = "thread"
    PROCESS = "process"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Placement:
    """One instance's place. `device` is "cpu", "cuda:0", … or "model", where the backend chooses itself;
    `name` is `<group>_<index>`. Passive instances are made and never given a batch. `cpu_cores` are those of
    the group's host policy; empty for all."""

    name: str
    device: str = "cpu"
    group: int = 0
    passive: bool = False
    cpu_cores: tuple[int, ...] = ()
    more_devices: tuple[str, ...] = ()
    """Further devices that the one instance spans (tensor parallelism)."""


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes that a version needs on each device before it may load; the ledger adds and refuses."""

    weights_bytes: int = 0
    workspace_bytes_per_instance: int = 0
    kv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DeviceRoom:
    """Of one device: what models may use in all, and what of it is left."""

    limit_bytes: int
    free_bytes: int


class Services(Protocol):
    """What the server does for a model, from any thread. Absent inside tests: a model may not rely on it."""

    def infer(self, request: InferRequest, decoupled: bool = False) -> None:
        """Answers, errors included, go to `request.sink` on a thread of the host's. One answer and no more
        unless `decoupled`."""
        ...

    def load_model(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None: ...
    def unload_model(self, name: str, unload_dependents: bool) -> None: ...
    def is_model_ready(self, name: str, version: str) -> bool: ...
    def log(self, level: str, message: str, file: str, line: int) -> None: ...
    def metric(self, operation: str, family: str, labels: Mapping[str, str], value: Any) -> Any: ...
    def progress(self, done: int, total: int, what: str) -> None: ...

    def wait_until(self, done: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Blocks this thread until `done()`, which answers make true; the value of `done()` at the end."""
        ...

    def poll(self) -> None:
        """Takes in cancellations and answers that have arrived, where no other thread does so."""
        ...

    def listen(self) -> None:
        """From now on a thread takes in what arrives, so that nobody need wait or poll."""
        ...


@dataclass(frozen=True, slots=True)
class LoadContext:
    """What there is to load: one version of one model, with its completed config."""

    config: ModelConfig
    version: int
    model_directory: Path
    """Local: remote repositories are brought here before. Holds config and version folders."""
    services: Services | None = None
    backend_options: Mapping[str, str] = field(default_factory=dict)
    """From --backend-config=<backend>,key=value and the global ones."""
    rooms: Mapping[str, DeviceRoom] = field(default_factory=dict)
    """For `memory_needs`: each device where instances will be."""

    @property
    def name(self) -> str:
        return str(self.config.name)

    @property
    def version_directory(self) -> Path:
        """The version's own folder; a model without version folders is its own and only version."""
        folder = self.model_directory / str(self.version)
        return folder if folder.is_dir() else self.model_directory

    def parameter(self, key: str, default: str = "") -> str:
        """The string value of the config's `parameters[key]`."""
        return str(self.config.parameters[key].string_value) if key in self.config.parameters else default


class Instance(ABC):
    """Where batches run. Subclass one of the three below."""

    def close(self) -> None:
        """Gives everything back. Nothing is running and nothing will be asked any more."""


class TensorInstance(Instance):
    """Runs whole batches: the host joins requests along the batch axis before and splits after."""

    kept_outputs: frozenset[str] = frozenset()
    """Set by the host before each `run`: outputs whose reader is on the same device. They may be left there, as
    DeviceData that stays valid after later runs; all others are wanted in host memory."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Mapping[str, Tensor]:
        """The named outputs (all if `outputs` is empty). May block; must not keep views of `inputs`."""


class RequestInstance(Instance):
    """Runs lists of requests and answers each through `request.sink`, now or later, from any thread."""

    polls_for_cancellation: ClassVar[bool] = False
    """True if it calls `Services.poll` before it looks at `request.cancelled`; then no thread need do so."""

    @abstractmethod
    def execute(self, requests: Sequence[InferRequest]) -> None:
        """Returning frees the instance for its next batch; answers that are still owed may follow.

        Raising fails every request that has not had its final answer.
        """

    def is_ready(self) -> bool:
        """The model's own word on its readiness, asked between batches."""
        return True


class GenerativeInstance(Instance):
    """Generates tokens for many sequences at once; it batches by itself and is never "busy"."""

    @abstractmethod
    def start(self, emit: Callable[[Sequence[TokenEvent]], None]) -> None:
        """Called once, before the first `submit`. `emit` gets the events of all sequences of one step in one
        call, from any thread, and never blocks; the last event of a sequence has a finish reason or an error.
        """

    @abstractmethod
    def submit(self, request: GenerateRequest) -> None:
        """Accepts at once, or raises and emits nothing for it. What is found later comes as an event."""

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """Frees what the sequence holds before the next step; ABORT follows. Unknown ids are ignored."""

    def metrics(self) -> Sequence[MetricFamily]:
        """A reading of the engine's own metrics, for each scrape. Any thread."""
        return ()


class Model(ABC):
    """One loaded version: weights and whatever its instances share."""

    @abstractmethod
    def create_instance(self, placement: Placement) -> Instance: ...

    def close(self) -> None:
        """After the last instance has closed."""


class Backend(ABC):
    """Stateless; made once a process. `options` of the config arrive with each LoadContext."""

    name: ClassVar[str]
    default_filename: ClassVar[str] = ""
    """The artifact inside a version folder when the config names none."""
    process_per_instance: ClassVar[bool] = False
    """In a process host each instance gets a process of its own."""

    def host_kind(self, config: ModelConfig) -> HostKind:
        return HostKind.THREAD

    def host_group(self, config: ModelConfig) -> str:
        """Models of kind PROCESS that name the same group share one process; "" is one of its own."""
        return ""

    def complete_config(self, context: LoadContext) -> ModelConfig:
        """The config with what the artifact says filled in. Runs in the model's host, before `load`."""
        return context.config

    def memory_needs(self, context: LoadContext) -> MemoryNeeds:
        """Read from the files alone, without loading them."""
        return MemoryNeeds()

    @abstractmethod
    def load(self, context: LoadContext) -> Model:
        """Raises an EnginehouseError whose text names the file and what is wrong with it."""
