"""What the hardware allows: bandwidth and arithmetic of a GPU, as its maker says and as measured now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

GIB = 1 << 30
_TOLD = {"H200": (4.8e12, 989e12), "H100 PCIe": (2.0e12, 756e12), "H100": (3.35e12, 989e12), "A100": (2.04e12, 312e12)}
"""Bytes a second, and operations a second in bfloat16 without sparsity, by a part of the device's name."""


@dataclass(frozen=True, slots=True)
class Limits:
    name: str
    told_bytes_per_s: float
    told_flops: float
    measured_bytes_per_s: float
    """Read and written, of a long copy."""
    measured_flops: float
    """Of a large product in bfloat16."""


def limits_of(device: torch.device) -> Limits:
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "simulated"
    told = next((numbers for part, numbers in _TOLD.items() if part in name), (float("nan"), float("nan")))
    num_bytes, width = (2 * GIB, 8192) if on_gpu else (1 << 24, 256)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * num_bytes / _seconds(partial(target.copy_, source), device)
    del source, target
    left = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    right = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    flops = 2 * width**3 / _seconds(partial(torch.matmul, left, right), device)
    return Limits(name, *told, copied, flops)


def _seconds(work: Callable[[], object], device: torch.device, times: int = 20) -> float:
    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        work()
    settle()
    started_s = time.perf_counter()
    for _ in range(times):
        work()
    settle()
    return (time.perf_counter() - started_s) / times
