"""Which share of a model this process holds: rank and world size, and how shares are joined.

One process is rank 0 of 1 and joins nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class ParallelGroup:
    """`all_reduce` sums over ranks; `all_gather` joins along the last axis."""

    rank: int = 0
    world_size: int = 1
    all_reduce: Callable[[torch.Tensor], torch.Tensor] = _same
    all_gather: Callable[[torch.Tensor], torch.Tensor] = _same

    def share(self, num_units: int) -> tuple[int, int]:
        """First unit and number of units (heads, columns) of this rank; fewer units than ranks repeat.

        Raises ValueError if they can't be divided.
        """
        if num_units % self.world_size == 0:
            size = num_units // self.world_size
            return self.rank * size, size
        if self.world_size % num_units == 0:
            return self.rank * num_units // self.world_size, 1
        raise ValueError(f"{num_units} heads or columns can't be divided among {self.world_size} ranks")
