"""What attention is to the engine: who owns a block's inner layout, writes new keys and values, and attends.

One implementation a file: `gather.py` (torch everywhere, slow), `cpu.py` (the native kernels),
`triton_*.py` (CUDA). A model's attention layers call `AttentionBackend.attend` with what the layer is and
what the step is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from enginehouse_backends.llm.layers import AttentionLayer

PLACE_BYTES = 256
"""A block's place in the arena is an int32 in units of so many bytes: 512 GiB can be addressed."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token's keys and values are, of this rank's heads."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    """Tokens in a block."""
    dtype: torch.dtype

    @property
    def dense_block_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.block_size * self.dtype.itemsize

    @property
    def padded_block_bytes(self) -> int:
        """Whole places."""
        return -(-self.dense_block_bytes // PLACE_BYTES) * PLACE_BYTES


@dataclass(slots=True)
class StepBatch:
    """One step's rows: the new tokens of all sequences, flat, in the order of the sequences.

    Made by the runner. T tokens, S sequences, R rows whose logits are wanted. All tensors on the device.
    """

    tokens: torch.Tensor
    """[T] int32"""
    positions: torch.Tensor
    """[T] int32"""
    query_starts: torch.Tensor
    """[S + 1] int32: sequence s has the rows query_starts[s] : query_starts[s + 1]."""
    context_lengths: torch.Tensor
    """[S] int32: keys that exist after this step's are written (computed before + new)."""
    block_places: torch.Tensor
    """[S, max_blocks] int32: where block i of a sequence starts in the arena, in PLACE_BYTES."""
    wanted_rows: torch.Tensor
    """[R] int64"""
    arena: torch.Tensor
    """The arena's memory, flat uint8: block b starts at byte block_places[s, b] * PLACE_BYTES."""
    kv_shape: KvShape
    attention: AttentionBackend
    max_query: int
    max_context: int


class AttentionBackend(ABC):
    """Stateless but for what `prepare` leaves on the step."""

    name: str

    def block_bytes(self, shape: KvShape) -> int:
        """Bytes of one block in this implementation's layout; a multiple of PLACE_BYTES."""
        return shape.padded_block_bytes

    @abstractmethod
    def attend(self, layer: AttentionLayer, qkv: torch.Tensor, step: StepBatch) -> torch.Tensor:
        """Attention of one layer. `qkv`: [T, (heads + 2 kv_heads) * head_dim], q first, then k, then v.

        Applies the layer's q/k norms and rotary table, writes keys and values to the blocks, attends
        causally (within the layer's window), and gives [T, heads * head_dim] in qkv's dtype.
        """
