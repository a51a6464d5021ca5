"""Which share of a model this process holds: rank and world size, and how shares are joined.

One process is rank 0 of 1 and joins nothing. Several are joined by NCCL on GPUs and by gloo elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from enginehouse.errors import Unsupported

_PATIENCE = timedelta(minutes=10)
"""For a rank that still compiles or loads; a rank that died is noticed at once (ranks.py)."""


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


def make_store(world_size: int) -> Any:
    """Where the ranks of this machine meet: rank 0 holds it and tells the others its `port`."""
    return _tcp_store()("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)


def find_store(port: int, world_size: int) -> Any:
    """The store of rank 0."""
    return _tcp_store()("127.0.0.1", port, world_size, is_master=False)


def _tcp_store() -> Any:
    import torch.distributed as distributed

    return vars(distributed)["TCPStore"]  # whose stubs don't say that it is there


def join_group(device: str, rank: int, world_size: int, store: Any) -> ParallelGroup:
    """Waits for the other ranks. A process can be in one group; all ranks are on this machine."""
    import torch.distributed as distributed

    if distributed.is_initialized():
        raise Unsupported(
            f"this process is one of {distributed.get_world_size()} ranks already; LLMs with another "
            f"tensor_parallel_size need another engine_group"
        )
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")
    on_gpu = device.startswith("cuda")
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_PATIENCE,
        device_id=torch.device(device) if on_gpu else None,
    )
    return ParallelGroup(rank, world_size, _all_reduce, partial(_all_gather, world_size))


def leave_group() -> None:
    import torch.distributed as distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    import torch.distributed as distributed

    tensor = tensor.contiguous()
    distributed.all_reduce(tensor)
    return tensor


def _all_gather(world_size: int, tensor: torch.Tensor) -> torch.Tensor:
    import torch.distributed as distributed

    shares = [torch.empty_like(tensor) for _ in range(world_size)]
    distributed.all_gather(shares, tensor.contiguous())
    return torch.cat(shares, dim=-1)
