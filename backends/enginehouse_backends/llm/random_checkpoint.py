"""A checkpoint that nobody trained: random weights of the right shapes, made where they will lie.

For measuring (`load_format: dummy`, as in vLLM): speed and memory of a model of which only config.json is there. A
tensor's values follow from its name alone, so that all ranks of a group make the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from enginehouse_backends.llm.architecture import Architecture
from enginehouse_backends.llm.checkpoint import Checkpoint, StoredTensor
from enginehouse_backends.llm.dense import load_dense
from enginehouse_backends.llm.layers import Build
from enginehouse_backends.llm.models import build_model

_SCALE = 0.02
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RandomCheckpoint(Checkpoint):
    """See module. For families that have a file of their own."""

    def __init__(self, folder: Path, architecture: Architecture, device: torch.device | None = None) -> None:
        self.folder = folder
        self._device = device or torch.device("cpu")
        self._dtype = _DTYPES.get(architecture.dtype, torch.bfloat16)
        shapes = _shapes(architecture)
        self._tensors = {name: self._stored(shape) for name, shape in shapes.items()}
        self._maps = {}

    def _stored(self, shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(self.folder, self._dtype, shape, 0, math.prod(shape) * self._dtype.itemsize)

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        stored = self.stored(name)
        assert shape in (None, stored.shape), f"bug: '{name}' is asked for in another shape than it was told in"
        made = torch.empty(stored.shape, dtype=self._dtype, device=self._device)
        if len(stored.shape) == 1:
            return made.fill_(1.0 if "norm" in name else 0.0)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return made.normal_(0.0, _SCALE, generator=generator)

    def release(self, name: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    model = build_model(Build(architecture, load_dense, max_positions=1))
    return {name: shape for layer in model.walk() for name, shape in layer.tensors()}
