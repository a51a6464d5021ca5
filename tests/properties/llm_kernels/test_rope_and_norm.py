"""Rotation with the cache write, norms and gated activations against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from enginehouse_backends.llm.kernels.triton_elementwise import gated_activation, rms_norm
from enginehouse_backends.llm.kernels.triton_rope import HeadNorm, PagedKv, TokenPlaces, rope_and_write

from . import references
from .paged import arena_views
from .references import relative_error

# float32 arithmetic; half precision types round the result once (8 and 11 bits)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def _cos_sin(num_positions: int, rotary_dim: int) -> torch.Tensor:
    inverse = 10_000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(num_positions)[:, None] * inverse
    return torch.cat([angles.cos(), angles.sin()], 1)


def _places(positions: torch.Tensor, blocks: torch.Tensor, block_tokens: int) -> TokenPlaces:
    """Each token is a sequence of its own whose block at its position is the given one."""
    count = len(positions)
    rows = torch.randperm(count)
    table = torch.full((count, int(positions.max()) // block_tokens + 1), 2**30, dtype=torch.int32)
    table[rows, positions.long() // block_tokens] = blocks.int()
    return TokenPlaces(positions, torch.arange(count, dtype=torch.int32), rows.int(), table)


def test_without_a_table_nothing_is_turned() -> None:
    key_view, value_view = arena_views(3, 1, 4, 1, 16, torch.float32)[0]
    qkv, out = torch.randn(2, 48), torch.empty(2, 16)
    places = _places(torch.tensor([5, 2], dtype=torch.int32), torch.tensor([2, 0]), 4)
    rope_and_write(qkv, out, PagedKv(key_view, value_view), places, None, num_query_heads=1)
    assert torch.equal(out, qkv[:, :16])
    assert torch.equal(key_view[[2, 0], [1, 2], 0], qkv[:, 16:32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "head_dim", "rotary_dim", "interleaved"),
    [(4, 2, 64, 64, False), (3, 1, 96, 72, False), (2, 2, 32, 16, True), (7, 1, 32, 32, False)],
)
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "head norm"])
def test_rope_and_write(
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    with_norm: bool,
    dtype: torch.dtype,
) -> None:
    num_tokens, block_tokens, num_pages = 9, 4, 11
    key_view, value_view = arena_views(num_pages, 1, block_tokens, kv_heads, head_dim, dtype)[0]
    untouched = key_view.clone()
    qkv = torch.randn(num_tokens, (query_heads + 2 * kv_heads) * head_dim).to(dtype)
    positions = torch.randint(0, 500, (num_tokens,), dtype=torch.int32)
    blocks = torch.randperm(num_pages)[:num_tokens]
    places = _places(positions, blocks, block_tokens)
    places.token_sequences[4] = -1
    cos_sin = _cos_sin(500, rotary_dim)
    norm = None
    if with_norm:
        norm = HeadNorm(torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype), 1e-6, 1.0)
    query_out = torch.full((num_tokens, query_heads * head_dim), float("nan"), dtype=dtype)
    rope_and_write(
        qkv, query_out, PagedKv(key_view, value_view), places, cos_sin,
        num_query_heads=query_heads, norm=norm, interleaved=interleaved,
    )  # fmt: skip

    heads = qkv.view(num_tokens, -1, head_dim)
    query, key = heads[:, :query_heads], heads[:, query_heads : query_heads + kv_heads]
    value = heads[:, query_heads + kv_heads :]
    if norm is not None:
        query = references.rms_norm(query, norm.query_weight, 1e-6, 1.0).to(dtype)
        key = references.rms_norm(key, norm.key_weight, 1e-6, 1.0).to(dtype)
    expected_query = references.rope(query, positions, cos_sin, interleaved)
    expected_key = references.rope(key, positions, cos_sin, interleaved)
    assert relative_error(query_out.view_as(query), expected_query) < TOLERANCE[dtype]
    written = torch.arange(num_tokens) != 4
    block, offset = blocks[written], positions.long()[written] % block_tokens
    assert relative_error(key_view[block, offset], expected_key[written]) < TOLERANCE[dtype]
    assert torch.equal(value_view[block, offset], value[written])
    key_view[block, offset] = untouched[block, offset]
    assert torch.equal(key_view.float().nan_to_num(7.0), untouched.float().nan_to_num(7.0)), (
        "something beside the tokens' places was written"
    )


def test_fp8_write_stores_the_nearest_value() -> None:
    key_view, value_view = arena_views(5, 1, 4, 1, 16, torch.float8_e4m3fn)[0]
    qkv = torch.randn(4, 3 * 16) * 200
    blocks = torch.tensor([0, 4, 3, 1])
    cos_sin = torch.cat([torch.ones(1, 8), torch.zeros(1, 8)], 1)
    rope_and_write(
        qkv, torch.empty(4, 16), PagedKv(key_view, value_view, 0.5, 0.25),
        _places(torch.zeros(4, dtype=torch.int32), blocks, 4), cos_sin, num_query_heads=1,
    )  # fmt: skip
    for view, expected in ((key_view, qkv[:, 16:32] / 0.5), (value_view, qkv[:, 32:] / 0.25)):
        stored = view[blocks, 0, 0]
        assert torch.equal(stored.float(), expected.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("columns", [64, 100, 896])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(columns: int, offset: float, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(5, columns).to(dtype), torch.randn(columns).to(dtype)
    found = rms_norm(hidden, weight, 1e-5, weight_offset=offset)
    assert relative_error(found, references.rms_norm(hidden, weight, 1e-5, offset)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rms_norm_adds_into_the_residual(dtype: torch.dtype) -> None:
    hidden, residual, weight = (
        torch.randn(3, 96).to(dtype),
        torch.randn(3, 96).to(dtype),
        torch.randn(96).to(dtype),
    )
    total = hidden + residual
    found = rms_norm(hidden, weight, 1e-5, residual=residual)
    assert torch.equal(residual, total)
    assert relative_error(found, references.rms_norm(total, weight, 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activation(activation: str, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(4, 2 * 1100) * 4).to(dtype)
    gate, up = gate_up.double().chunk(2, 1)
    gated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    assert relative_error(gated_activation(gate_up, activation), gated * up) < TOLERANCE[dtype]
