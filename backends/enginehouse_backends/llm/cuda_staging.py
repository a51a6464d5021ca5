"""What a GPU's runner is set to, and the memory through which a step goes over and comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from enginehouse_backends.llm.device_runtime import Graph
from enginehouse_backends.llm.runner import StepInput
from enginehouse_backends.llm.step_layout import StepLayout, StepSizes


@dataclass(frozen=True, slots=True)
class CudaRunnerSettings:
    """max_sequences: slots of the block table, and the largest batch that gets a graph."""

    dtype: torch.dtype
    max_tokens: int
    max_sequences: int
    max_wanted: int
    max_positions: int
    block_size: int = 16
    quantization: str = ""
    kv_cache_dtype: torch.dtype | None = None
    pooling: str = ""
    """Of a model that embeds."""
    attention: str = ""
    """Of planning.LlmPlan."""
    use_graphs: bool = True


@dataclass(slots=True)
class Staging:
    """Pinned memory of one step: what goes over and what comes back."""

    words: torch.Tensor
    tokens: torch.Tensor
    table_rows: torch.Tensor
    host_logits: torch.Tensor | None = None
    is_free: bool = True


@dataclass(slots=True)
class Bucket:
    """A captured batch size. `logits` lies where the graph leaves it."""

    layout: StepLayout
    graph: Graph
    logits: list[torch.Tensor] = field(default_factory=list)


def exact_sizes(step: StepInput, tiles: list[tuple[int, int]]) -> StepSizes:
    decodes = int((np.diff(step.query_starts) == 1).sum())
    return StepSizes(len(step.tokens), len(step.slots), len(step.wanted_rows), decodes, len(tiles))
