"""What is remembered of answers: keys, entries, and the cache in this process. No I/O and no clock here.

A key is a hash of the model, its version and the inputs (names, types, shapes, bytes); the request's id,
parameters and outputs are no part of it. An entry answers a request if it holds all outputs that it asks for.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from enginehouse.types import DataType, InferRequest, Tensor

ENTRY_OVERHEAD_BYTES = 512
"""What an entry and a tensor cost besides their bytes, about."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """The outputs of one answer. Their memory is their own."""

    outputs: tuple[Tensor, ...]
    has_all: bool
    """They are all that the model makes, not only what one request asked for."""
    num_bytes: int

    @classmethod
    def of(cls, outputs: Sequence[Tensor], has_all: bool) -> CacheEntry:
        """Copies: an answer's tensors are views of memory that is used again."""
        own = tuple(
            Tensor(output.name, output.datatype, output.shape, memoryview(bytes(output.host_data())))
            for output in outputs
        )
        size = sum(output.nbytes for output in own) + ENTRY_OVERHEAD_BYTES * (1 + len(own))
        return cls(own, has_all, size)

    def answers(self, requested: Sequence[str]) -> bool:
        if self.has_all:
            return True
        return bool(requested) and set(requested) <= {output.name for output in self.outputs}

    # --- as bytes, for caches outside this process

    def encode(self) -> bytes:
        outputs = [(one.name, one.datatype.wire_name, one.shape, one.host_data()) for one in self.outputs]
        return msgspec.msgpack.encode((self.has_all, outputs))

    @classmethod
    def decode(cls, data: bytes) -> CacheEntry:
        """Raises msgspec.MsgspecError for bytes that `encode` did not make."""
        has_all, outputs = msgspec.msgpack.decode(data, type=_Encoded)
        tensors = tuple(
            Tensor(name, DataType.from_wire(datatype), shape, memoryview(content))
            for name, datatype, shape, content in outputs
        )
        return cls(tensors, has_all, len(data))


_Encoded = tuple[bool, list[tuple[str, str, tuple[int, ...], bytes]]]


def cache_key(model_name: str, version: int, request: InferRequest, fingerprint: str = "") -> bytes:
    """`fingerprint` tells apart what the same version held at different times."""
    digest = hashlib.blake2b(f"{model_name}\0{version}\0{fingerprint}\0".encode(), digest_size=20)
    inputs = request.inputs
    for name in sorted(inputs) if len(inputs) > 1 else inputs:
        tensor = inputs[name]
        digest.update(f"{name}\0{tensor.datatype.wire_name}{tensor.shape}{tensor.nbytes}\0".encode())
        digest.update(tensor.host_data())
    return digest.digest()


@dataclass
class CacheCounts:
    """What a cache did so far. The cached scheduler adds to it, metrics read it."""

    num_lookups: int = 0
    num_hits: int = 0
    num_misses: int = 0
    num_evictions: int = 0
    lookup_ns: int = 0
    insertion_ns: int = 0


class ResponseCache(Protocol):
    """One per server. `get` and `put` of a `local` cache return at once, those of others are awaited."""

    counts: CacheCounts

    @property
    def num_entries(self) -> int: ...
    @property
    def utilization(self) -> float:
        """Share of its capacity that is used, 0 to 1."""
        ...

    async def close(self) -> None: ...


@dataclass
class LocalCache:
    """In this process, bounded by bytes; the entry that was used longest ago goes first."""

    capacity_bytes: int
    used_bytes: int = 0
    counts: CacheCounts = field(default_factory=CacheCounts)
    _entries: OrderedDict[bytes, CacheEntry] = field(default_factory=OrderedDict)

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    @property
    def utilization(self) -> float:
        return self.used_bytes / self.capacity_bytes if self.capacity_bytes else 0.0

    def get(self, key: bytes) -> CacheEntry | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, entry: CacheEntry) -> bool:
        """False if it doesn't fit even alone: then nothing changes."""
        if entry.num_bytes > self.capacity_bytes:
            return False
        replaced = self._entries.pop(key, None)
        if replaced is not None:
            self.used_bytes -= replaced.num_bytes
        while self.used_bytes + entry.num_bytes > self.capacity_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.used_bytes -= evicted.num_bytes
            self.counts.num_evictions += 1
        self._entries[key] = entry
        self.used_bytes += entry.num_bytes
        return True

    async def close(self) -> None:
        self._entries.clear()
        self.used_bytes = 0
