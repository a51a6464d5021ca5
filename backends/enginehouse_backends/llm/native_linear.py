"""Linears packed for the native CPU kernels: one copy of the weights in a layout that serves every batch size."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.kernels.library import Library, NativeType, library
from enginehouse_backends.llm.layers import Build, LinearKernel, LinearSpec, Part, read_bias_share, read_share
from enginehouse_backends.llm.program import Symbol

NATIVE_TYPES = {
    torch.float32: NativeType.FLOAT32,
    torch.bfloat16: NativeType.BFLOAT16,
    torch.float16: NativeType.FLOAT16,
}
PACKED_TYPES = (torch.float32, torch.bfloat16)
_SLICE_ELEMENTS = 1 << 20


class NativeMemory:
    """Memory of the library's, given back when the last user goes."""

    def __init__(self, num_bytes: int) -> None:
        self._library: Library = library()
        self.num_bytes = num_bytes
        self.address = self._library.allocate(num_bytes)

    def array(self) -> torch.Tensor:
        """The memory as flat bytes; not to be used when this is gone."""
        return torch.frombuffer((ctypes.c_char * self.num_bytes).from_address(self.address), dtype=torch.uint8)

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._library.free(self.address, self.num_bytes)


class NativeLinear(LinearKernel):
    """Weights [out, in] packed by the library; runs inside a native program only."""

    def __init__(self, dtype: torch.dtype, out_features: int, in_features: int, paired: bool = False) -> None:
        self.dtype, self.out_features, self.in_features = dtype, out_features, in_features
        self.paired = paired
        self.num_bytes = library().packed_elements(out_features, in_features) * dtype.itemsize
        self.packed = NativeMemory(self.num_bytes)
        self.bias: torch.Tensor | None = None
        """[out, rounded up to whole vectors] float32"""

    def put(self, weight: torch.Tensor, first_output: int) -> None:
        """Packs rows of [some outputs, in] at their place."""
        if weight.stride(-1) != 1 or weight.dtype not in NATIVE_TYPES:
            weight = weight.to(torch.float32).contiguous()
        # a slice at a time: the threads are shared with models that are generating meanwhile
        step = max(1, _SLICE_ELEMENTS // self.in_features)
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step]
            library().pack(
                (NATIVE_TYPES[self.dtype], NATIVE_TYPES[weight.dtype]),
                (rows.data_ptr(), weight.stride(0)),
                (first_output + start, rows.shape[0]),
                (self.out_features, self.in_features),
                self.packed.address,
                self.paired,
            )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("bug: a packed linear was called outside its program")

    def record(self, x: Symbol) -> Symbol:
        return x.program.add("linear", self.out_features, (x,), parts={"kernel": self})


def load_native(spec: LinearSpec, checkpoint: Checkpoint, build: Build) -> LinearKernel:
    """Reads each part from the file straight into its packed place, and lets go of the file's pages."""
    shares = [read_share(checkpoint, part, spec, build) for part in spec.parts]
    out_features, in_features = sum(share.shape[0] for share in shares), shares[0].shape[1]
    kernel = NativeLinear(build.dtype, out_features, in_features, packs_pairs(spec.paired, out_features))
    first = 0
    while shares:
        share = shares.pop(0)
        kernel.put(share, first)
        first += share.shape[0]
        del share
    for part in spec.parts:
        _release(checkpoint, part, build)
    if spec.bias:
        shares = [read_bias_share(checkpoint, part, spec, build) for part in spec.parts]
        kernel.bias = padded_bias(alternated(shares) if kernel.paired else torch.cat(shares))
    return kernel


def packs_pairs(paired: bool, out_features: int) -> bool:
    """Whether the two parts of such a linear alternate: each has to be a number of whole vectors."""
    return paired and out_features % (2 * library().lanes) == 0


def alternated(halves: Sequence[torch.Tensor]) -> torch.Tensor:
    """A vector of the first, one of the second, and so on."""
    return torch.stack([half.reshape(-1, library().lanes) for half in halves], dim=1).flatten()


def _release(checkpoint: Checkpoint, part: Part, build: Build) -> None:
    stored = checkpoint.stored(f"{part.name}.weight")
    checkpoint.release(f"{part.name}.weight")
    build.on_loaded(stored.stop - stored.start)


def padded_bias(bias: torch.Tensor) -> torch.Tensor:
    """[out] → [out, rounded up to whole vectors] float32"""
    lanes = library().lanes
    padded = torch.zeros(-(-bias.shape[0] // lanes) * lanes, dtype=torch.float32)
    padded[: bias.shape[0]] = bias
    return padded
