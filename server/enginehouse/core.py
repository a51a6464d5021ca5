"""The one front door: every front end, ensemble step and BLS call comes through here.

Finds the ready version, checks the tensors against the config, stamps times, and hands the request to the
version's scheduler. Knows nothing of any protocol.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from enginehouse.config.schema import ModelConfig
from enginehouse.types import GenerateRequest, InferRequest, InferResponse, TensorSpec, TokenEvent


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A line of the repository index. `version` is "" while no version was ever tried."""

    name: str
    version: str = ""
    state: str = ""
    """LOADING, READY, UNLOADING, UNAVAILABLE or ""."""
    reason: str = ""


@dataclass(slots=True)
class ServedVersion:
    """A version that can be asked. Front ends read it; core and lifecycle own it."""

    name: str
    version: int
    config: ModelConfig
    inputs: Mapping[str, TensorSpec]
    """With the batch axis (-1 first) where the model batches; control inputs are not among them."""
    outputs: Mapping[str, TensorSpec]
    ready_versions: Sequence[str]
    """All ready versions of this model, ascending: what metadata lists."""
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By output: lines of its label file, for the classification extension."""
    decoupled: bool = False
    generative: bool = False
    extra: Any = None


class Core:
    """See module. All methods are called on the server's loop and never block it."""

    server_name: str
    server_version: str
    extensions: Sequence[str]

    # --- health
    def is_live(self) -> bool: ...
    def is_ready(self) -> bool: ...
    def is_model_ready(self, name: str, version: str = "") -> bool:
        """Raises InvalidArgument for a version that is no number. Unknown models are not ready."""

    # --- models
    def model(self, name: str, version: str = "") -> ServedVersion:
        """Raises NotFound for an unknown model or version, Unavailable for one that is not ready."""

    def index(self, repository: str = "", ready_only: bool = False) -> list[IndexEntry]: ...
    async def load(self, name: str, config: str | None = None, files: Mapping[str, bytes] | None = None) -> None: ...
    async def unload(self, name: str, unload_dependents: bool = False) -> None: ...
    def statistics(self, name: str = "", version: str = "") -> list[Any]:
        """inference.ModelStatistics messages (config.schema.ModelStatistics)."""

    # --- inference
    def submit(self, request: InferRequest) -> None:
        """Checks and accepts, or raises; then `request.sink` gets answers on the loop, one of them final."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """For models with one answer. Sets the sink itself. Raises the response's error; a cancelled task
        cancels the request. Unsupported for a decoupled model: use `stream`."""

    def stream(self, request: InferRequest) -> AsyncIterator[InferResponse]:
        """Every answer, errors included (in `error`), the final one last. Leaving early cancels."""

    def generate(self, request: GenerateRequest, emit: Callable[[TokenEvent], None]) -> None:
        """To an LLM's engine. Raises Unsupported for a model that is none."""

    def cancel_generate(self, model_name: str, request_id: str) -> None: ...

    # --- controls: attributes `tracing` (observe.tracing.TraceSettings by model), `logs`
    # (observe.logs.LogSettings), `metrics` (observe.metrics.Metrics), `options` (options.ServerOptions)
    tracing: Any
    logs: Any
    metrics: Any
    options: Any
