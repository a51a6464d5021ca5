"""Other libraries' kernels over our blocks, where they are installed: FlashAttention 3 and FlashInfer.

Both take pages by number and their strides from the tensor, so a block's place in the arena serves as its number.
Written against flash_attn_interface of Dao-AILab/flash-attention (hopper) and flashinfer's
BatchPrefillWithPagedKVCacheWrapper; choosing.py checks what they give before they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import torch

from enginehouse_backends.llm.attention import KvShape
from enginehouse_backends.llm.attention.triton_backend import DeviceStep, PagedKernels
from enginehouse_backends.llm.attention.triton_paged import AttentionShape
from enginehouse_backends.llm.kernels.triton_rope import PagedKv
from enginehouse_backends.llm.runner import StepInput

_HALVES = (torch.float16, torch.bfloat16)
_FLASHINFER_WORKSPACE_BYTES = 128 << 20


class FlashAttention3(PagedKernels):
    """One call for all sequences of a step, prompts and decoding alike. Hopper."""

    name = "fa3"
    module = "flash_attn_interface"

    def __init__(self) -> None:
        self._attend: Any = importlib.import_module(self.module).flash_attn_with_kvcache

    def attend(self, query: torch.Tensor, cache: PagedKv, step: DeviceStep, shape: AttentionShape) -> torch.Tensor:
        out = self._attend(
            query.view(query.shape[0], -1, cache.key.shape[3]),
            cache.key,
            cache.value,
            cache_seqlens=step.context_lengths,
            page_table=step.page_table,
            cu_seqlens_q=step.query_starts,
            max_seqlen_q=step.max_query,
            softmax_scale=shape.scale,
            causal=True,
            window_size=(shape.window - 1, 0) if shape.window else (-1, -1),
            softcap=shape.softcap,
        )
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found.reshape(query.shape)


class FlashInfer(PagedKernels):
    """Steps with prompts. It plans on the host, so no graph can hold it.

    A plan is copied from pinned memory when the device gets there, and two steps may be unfinished: two wrappers take
    turns for each kind of layer.
    """

    name = "flashinfer"
    module = "flashinfer"
    is_capturable = False

    def __init__(self) -> None:
        self._library: Any = importlib.import_module(self.module)
        self._wrappers: dict[tuple[AttentionShape, int], Any] = {}
        self._planned: dict[tuple[AttentionShape, int], int] = {}

    def attend(self, query: torch.Tensor, cache: PagedKv, step: DeviceStep, shape: AttentionShape) -> torch.Tensor:
        key = (shape, step.number % 2)
        if key not in self._wrappers:
            workspace = torch.empty(_FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
            self._wrappers[key] = self._library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper = self._wrappers[key]
        rows = query.view(query.shape[0], -1, cache.key.shape[3])
        if self._planned.get(key) != step.number:
            assert step.given is not None, "bug: a plan is wanted while a graph is captured"
            self._plan(wrapper, rows, cache, step.given, shape)
            self._planned[key] = step.number
        found: torch.Tensor = wrapper.run(rows, (cache.key.transpose(1, 2), cache.value.transpose(1, 2)))
        return found.reshape(query.shape)

    @staticmethod
    def _plan(wrapper: Any, rows: torch.Tensor, cache: PagedKv, step: StepInput, shape: AttentionShape) -> None:
        block_size, num_kv_heads, head_dim = cache.key.shape[1:]
        lengths = step.context_lengths
        num_blocks = -(-lengths // block_size)
        places = np.concatenate(
            [step.block_table[slot, :count] for slot, count in zip(step.slots, num_blocks, strict=True)]
        )
        indices = torch.from_numpy(places)
        if rows.is_cuda:
            indices = indices.pin_memory().to(rows.device, non_blocking=True)
        wrapper.plan(
            torch.from_numpy(step.query_starts),
            torch.from_numpy(np.concatenate(([0], np.cumsum(num_blocks))).astype(np.int32)),
            indices,
            torch.from_numpy(((lengths - 1) % block_size + 1).astype(np.int32)),
            rows.shape[1],
            num_kv_heads,
            head_dim,
            block_size,
            causal=True,
            sm_scale=shape.scale,
            window_left=shape.window - 1 if shape.window else -1,
            logits_soft_cap=shape.softcap or None,
            q_data_type=rows.dtype,
            kv_data_type=cache.key.dtype,
        )


ALTERNATIVES: tuple[type[FlashAttention3] | type[FlashInfer], ...] = (FlashAttention3, FlashInfer)


def why_not(kind: type[FlashAttention3] | type[FlashInfer], shape: KvShape, dtype: torch.dtype) -> str:
    """Why these kernels can't be used here; "" if they can be tried."""
    if importlib.util.find_spec(kind.module) is None:
        return f"'{kind.module}' isn't installed"
    if dtype not in _HALVES or shape.dtype != dtype:
        return f"it attends in 16 bits, and queries are {dtype}, keys and values {shape.dtype}"
    if shape.head_dim not in (64, 128, 256):
        return f"it knows heads of 64, 128 and 256, not of {shape.head_dim}"
    return ""
