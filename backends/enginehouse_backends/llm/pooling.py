"""One vector of a whole text: which of a model's rows make it, as sentence-transformers' files say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from enginehouse.errors import InvalidArgument, Unsupported
from enginehouse_backends.llm.runner import StepInput

Vector = npt.NDArray[np.float32]
LAST, MEAN = "last", "mean"
_KINDS = {"pooling_mode_lasttoken": LAST, "pooling_mode_mean_tokens": MEAN}
_TASKS = ("", "generate", "embed")


@dataclass(frozen=True, slots=True)
class PoolingSettings:
    """`kind` is "last", "mean", or "" for a model that generates."""

    kind: str = ""
    normalizes: bool = True


def read_pooling(folder: Path, task: str) -> PoolingSettings:
    """task: what the config asks for; "" embeds where sentence-transformers' modules.json lies beside the weights.

    Raises InvalidArgument for an unknown task, Unsupported for a pooling that a decoder doesn't have.
    """
    if task not in _TASKS:
        raise InvalidArgument(f"serving.llm.task '{task}' is none of generate, embed")
    modules = _read(folder / "modules.json", [])
    if task == "generate" or (not task and not modules):
        return PoolingSettings()
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    normalizes = "Normalize" in kinds or not modules
    asked = _read(folder / "1_Pooling" / "config.json", {"pooling_mode_lasttoken": True})
    chosen = sorted(key for key, value in asked.items() if key.startswith("pooling_mode_") and value is True)
    if len(chosen) != 1 or chosen[0] not in _KINDS:
        raise Unsupported(
            f"{folder / '1_Pooling' / 'config.json'}: a decoder is pooled by its last token or their mean, not by "
            f"{', '.join(chosen) or 'nothing'}"
        )
    return PoolingSettings(_KINDS[chosen[0]], normalizes)


def wanted_rows(step_counts: npt.NDArray[np.int32], kind: str) -> npt.NDArray[np.int32]:
    """Rows of a step that make its vectors: each sequence's last, or all. step_counts: tokens of each sequence."""
    stops = np.cumsum(step_counts, dtype=np.int32)
    return (stops - 1).astype(np.int32) if kind == LAST else np.arange(stops[-1], dtype=np.int32)


def pool_rows(rows: torch.Tensor, step: StepInput, kind: str) -> torch.Tensor:
    """rows: [R, width] of the wanted rows → [S, width]: each sequence's last one, or the sum of its own."""
    if kind == LAST:
        return rows
    counts = torch.from_numpy(np.diff(step.query_starts)).long()
    of_sequence = torch.repeat_interleave(torch.arange(len(counts)), counts).to(rows.device)
    return rows.new_zeros((len(counts), rows.shape[1])).index_add_(0, of_sequence, rows)


@dataclass(slots=True)
class PooledText:
    """A text's vector while its tokens are computed chunk by chunk."""

    settings: PoolingSettings
    num_tokens: int
    _sum: Vector | None = field(default=None)

    def add(self, vector: Vector, is_first: bool) -> None:
        """What one step gave for it. A preempted text begins anew."""
        adds = self.settings.kind == MEAN and self._sum is not None and not is_first
        self._sum = self._sum + vector if adds and self._sum is not None else vector.copy()

    def finish(self) -> Vector:
        assert self._sum is not None, "bug: a text was pooled without a row"
        vector = self._sum / self.num_tokens if self.settings.kind == MEAN else self._sum
        if self.settings.normalizes:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return vector.astype(np.float32)


def _read(path: Path, otherwise: Any) -> Any:
    if not path.is_file():
        return otherwise
    try:
        return json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidArgument(f"{path} is no JSON: {error}") from error
