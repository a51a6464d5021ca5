"""Compiles what the launchers launch, for GPUs that aren't here, and reads what the assembler says of it.

A driver that only knows its target stands in for CUDA's; every launch inside `compiling` becomes a
compilation with exactly the arguments and options of the launch. Needs Triton with its interpreter off.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, KernelInterface


@dataclass(frozen=True, slots=True)
class CompiledLaunch:
    """What ptxas says of one kernel for one target."""

    kernel: str
    capability: int
    registers: int
    spilled_bytes: int
    """Stores to local memory; loads are about as many."""
    shared_bytes: int
    num_warps: int
    matrix_instructions: str
    """The widest kind among the PTX: tcgen05 (Blackwell), wgmma (Hopper), mma, or "" for none."""


class _TargetOnly(DriverBase):  # type: ignore[misc]  # triton has no types
    """Knows the target and nothing else. The capability serves as the device number: a cache for each."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched here")

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError("nothing is launched here")


@contextmanager
def compiling(capability: int) -> Iterator[list[CompiledLaunch]]:
    """Inside, launches compile for `capability` (80, 90, 100, …) and add what came of them to the list."""
    found: list[CompiledLaunch] = []
    before, launch = driver._active, KernelInterface.__getitem__

    def compile_instead(function: JITFunction, grid: object) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            found.append(_inspect(function.run(*args, grid=None, warmup=True, **kwargs), capability))

        return run

    KernelInterface.__getitem__ = compile_instead
    driver.set_active(_TargetOnly(capability))
    try:
        yield found
    finally:
        KernelInterface.__getitem__ = launch
        driver._active = before


def _inspect(kernel: Any, capability: int) -> CompiledLaunch:
    log = _assemble(kernel.asm["ptx"], capability)
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores", log)
    assert registers is not None, f"bug: ptxas reports no registers: {log}"
    instructions = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    widest = next((name for name in instructions if name in kernel.asm["ptx"]), "")
    return CompiledLaunch(
        kernel.metadata.name,
        capability,
        int(registers.group(1)),
        sum(map(int, spills)),
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        widest.split(".")[0],
    )


def _assemble(ptx: str, capability: int) -> str:
    tool = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None, "bug: PTX without a target"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [tool.path, "-v", f"--gpu-name={architecture.group(1)}", source.name, "-o", "/dev/null"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stderr
