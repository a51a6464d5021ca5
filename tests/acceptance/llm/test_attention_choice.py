"""Attention by other libraries: FlashAttention 3 and FlashInfer as their documentation says they behave.

Neither runs without a GPU. Stand-ins with the same signatures compute from what they are handed, in torch: pages by
number over strided caches, so wrong numbers, strides or lengths give wrong tokens.
"""

from __future__ import annotations

import importlib.machinery
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from enginehouse.errors import Unsupported
from enginehouse.types import SamplingParameters
from enginehouse_backends.llm.attention.gather import attend_one
from enginehouse_backends.llm.kernels import interpreting
from tests.acceptance.llm.serving import Serving
from tests.acceptance.llm.small_models import SHAPE, make_reference

interpreting.install()
GREEDY = SamplingParameters(temperature=0.0, max_tokens=4, ignore_eos=True)
PROMPTS = ([5, 250, 17, 3], list(range(20, 41)))


class Heads:
    """What attend_one asks of a layer."""

    def __init__(self, query: torch.Tensor, keys: torch.Tensor, scale: float, window: int, softcap: float) -> None:
        self.num_heads, self.num_kv_heads = query.shape[1], keys.shape[1]
        self.scale, self.window, self.softcap = scale, window, softcap


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: Any) -> torch.Tensor:
    positions = torch.arange(len(keys) - len(query), len(keys))
    return attend_one(heads, query.float(), keys.float(), values.float(), positions).to(query.dtype)


def flash_attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *, cache_seqlens: torch.Tensor,
    page_table: torch.Tensor, cu_seqlens_q: torch.Tensor, max_seqlen_q: int, softmax_scale: float, causal: bool,
    window_size: tuple[int, int], softcap: float,
) -> torch.Tensor:  # fmt: skip
    """q: [T, heads, dim] · caches: [pages, page size, kv heads, dim]"""
    assert causal
    out, size = torch.full_like(q, float("nan")), k_cache.shape[1]
    window = window_size[0] + 1 if window_size[0] >= 0 else 0
    starts, lengths = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    for sequence, length in enumerate(lengths):
        first, stop = starts[sequence : sequence + 2]
        assert stop - first <= max_seqlen_q
        if stop == first:
            continue
        pages = page_table[sequence, : -(-length // size)].long()
        keys, values = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        out[first:stop] = attend(q[first:stop], keys, values, Heads(q, keys, softmax_scale, window, softcap))
    return out


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND"

    def plan(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int,
        *, causal: bool, sm_scale: float, window_left: int, logits_soft_cap: float | None, q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert causal
        assert q_data_type == kv_data_type == torch.bfloat16
        self.planned = (qo_indptr, paged_kv_indptr, paged_kv_indices.clone(), paged_kv_last_page_len)
        self.shape = (page_size, sm_scale, window_left + 1 if window_left >= 0 else 0, logits_soft_cap or 0.0)

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """caches: [pages, kv heads, page size, dim]"""
        starts, page_starts, indices, last = (part.tolist() for part in self.planned)
        size, scale, window, softcap = self.shape
        out = torch.empty_like(q)
        for sequence, last_len in enumerate(last):
            first, stop = starts[sequence : sequence + 2]
            pages = torch.tensor(indices[page_starts[sequence] : page_starts[sequence + 1]])
            length = (len(pages) - 1) * size + last_len
            keys, values = (cache[pages].transpose(1, 2).flatten(0, 1)[:length] for cache in paged_kv_cache)
            out[first:stop] = attend(q[first:stop], keys, values, Heads(q, keys, scale, window, softcap))
        return out


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=flash_attn_with_kvcache)
    install(monkeypatch, "flashinfer", BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64, and a window in every other layer."""
    path = tmp_path_factory.mktemp("model")
    settings: dict[str, Any] = {**SHAPE, "num_hidden_layers": 2, "head_dim": 64, "sliding_window": 8}
    config = transformers.Gemma2Config(**settings, query_pre_attn_scalar=24, attn_logit_softcapping=5.0)
    make_reference(config).to(torch.bfloat16).save_pretrained(path)
    return path


def serve(folder: Path, attention: str) -> tuple[str, list[list[int]]]:
    serving = Serving(
        folder, kv_bytes=32 << 20, device="simulated:0", parameters={"attention": attention}, max_model_len=64,
        max_num_seqs=4,
    )  # fmt: skip
    try:
        found = [result.token_ids for result in serving.generate_all(PROMPTS, GREEDY)]
        return serving.instance.llm.runner.attention_choice, found  # type: ignore[attr-defined]  # the GPU runner's
    finally:
        serving.close()


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    ("attention", "chosen"),
    [
        ("fa3", r"prompts by fa3 \(triton \d+ us, fa3 \d+ us\); decoding by fa3 \(triton \d+ us, fa3 \d+ us\)"),
        ("flashinfer", r"prompts by flashinfer \(triton \d+ us, flashinfer \d+ us\); decoding by triton"),
    ],
)
def test_a_forced_library_gives_tritons_tokens(attention: str, chosen: str, folder: Path) -> None:
    _, expected = serve(folder, "triton")
    choice, found = serve(folder, attention)
    assert found == expected
    assert re.fullmatch(chosen, choice), choice


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("both")
def test_a_library_that_computes_something_else_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return q

    install(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=wrong)
    choice, _ = serve(folder, "auto")
    assert "fa3 left out: it is off by" in choice
    with pytest.raises(Unsupported, match="attention 'fa3' can't be used: it is off by"):
        serve(folder, "fa3")


def test_a_library_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(Unsupported, match="attention 'fa3' can't be used: 'flash_attn_interface' isn't installed"):
        serve(folder, "fa3")
