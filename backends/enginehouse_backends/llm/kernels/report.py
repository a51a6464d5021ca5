"""Writes docs/gpu-kernels.md: every kernel as its launcher would launch it for models that people run.

    TRITON_INTERPRET=0 python -m enginehouse_backends.llm.kernels.report docs/gpu-kernels.md

Needs no GPU: see compile_ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import triton

from enginehouse_backends.llm.attention.tiles import query_tokens_per_tile, rows_per_tile
from enginehouse_backends.llm.attention.triton_paged import (
    AttentionShape,
    DecodeWorkspace,
    PrefillPlan,
    SequencePlaces,
    decode_attention,
    prefill_attention,
)
from enginehouse_backends.llm.kernels.compile_ahead import CompiledLaunch, compiling
from enginehouse_backends.llm.kernels.triton_elementwise import gated_activation, rms_norm
from enginehouse_backends.llm.kernels.triton_experts import ExpertWeights, run_experts
from enginehouse_backends.llm.kernels.triton_quantized import (
    CodedWeight,
    Fp8Weight,
    coded_linear,
    fp8_linear,
    quantize_rows,
)
from enginehouse_backends.llm.kernels.triton_rope import HeadNorm, PagedKv, TokenPlaces, rope_and_write
from enginehouse_backends.llm.kernels.triton_sampling import SamplingRows, sample

CAPABILITIES = (80, 90, 100)
BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Case:
    """`launch` calls a launcher with tensors whose types and strides are real and whose sizes are small."""

    what: str
    launch: Callable[[], object]
    minimum_capability: int = 80


@dataclass(frozen=True, slots=True)
class Heads:
    name: str
    kv_heads: int
    group: int
    head_dim: int
    shape: AttentionShape


MODELS = (
    Heads("Llama 3.1 8B", 8, 4, 128, AttentionShape(128**-0.5)),
    Heads("Qwen2.5 0.5B", 2, 7, 64, AttentionShape(64**-0.5)),
    Heads("Gemma 2 9B", 8, 2, 256, AttentionShape(1 / 16, softcap=50.0, window=4096)),
    Heads("Phi-3 mini", 32, 1, 96, AttentionShape(96**-0.5, window=2047)),
)


def cases() -> Iterator[Case]:
    for heads in MODELS:
        yield from _attention_cases(heads, BF16, 80)
    yield from _attention_cases(MODELS[0], FP8, 89)
    yield Case("add, RMS norm, 4096", lambda: rms_norm(_bf16(8, 4096), _f32(4096), 1e-5, residual=_bf16(8, 4096)))
    yield Case("SiLU gate, 14336", lambda: gated_activation(_bf16(8, 28672), "silu"))
    yield Case("sampling, 128256 tokens", _sample)
    for num_rows in (8, 4096):
        yield Case(f"experts, Qwen3-30B-A3B, {num_rows} rows", lambda rows=num_rows: _experts(rows))  # type: ignore[misc]
    for num_rows in (1, 32, 512):
        yield Case(f"int4 weights, group 128, {num_rows} rows", lambda rows=num_rows: _coded(4, 128, rows))  # type: ignore[misc]
    yield Case("int4 weights, group 32, 1 row", lambda: _coded(4, 32, 1))
    yield Case("NF4 weights, 1 row", lambda: _coded(4, 64, 1, _f32(16)))
    yield Case("int8 weights, 1 row", lambda: _coded(8, 128, 1))
    yield Case("rows to FP8", lambda: quantize_rows(_bf16(8, 4096)), 89)
    for num_rows in (1, 512):
        yield Case(f"FP8 product, {num_rows} rows", lambda rows=num_rows: _fp8(rows, 0), 89)  # type: ignore[misc]
        yield Case(f"FP8 product in blocks, {num_rows} rows", lambda rows=num_rows: _fp8(rows, 128), 89)  # type: ignore[misc]


def compile_cases(capability: int) -> Iterator[tuple[str, CompiledLaunch]]:
    """Each case that the capability can run, with each kernel that it launches."""
    for case in cases():
        if capability >= case.minimum_capability:
            with compiling(capability) as launches:
                case.launch()
            yield from ((case.what, launch) for launch in launches)


def _bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=BF16)


def _f32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def _i32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def _cache(heads: Heads, dtype: torch.dtype) -> PagedKv:
    block_tokens = 16
    size = (2, block_tokens, heads.kv_heads, heads.head_dim)
    half = block_tokens * heads.kv_heads * heads.head_dim
    # blocks lie at any multiple of 256 bytes, so that is the stride of their places
    strides = (256 // dtype.itemsize, heads.head_dim, block_tokens * heads.head_dim, 1)
    memory = torch.zeros(4 * half * dtype.itemsize, dtype=torch.uint8).view(dtype)
    return PagedKv(memory.as_strided(size, strides), memory.as_strided(size, strides, half), 0.5, 0.5)


def _attention_cases(heads: Heads, cache_dtype: torch.dtype, minimum: int) -> Iterator[Case]:
    name = heads.name + (", FP8 cache" if cache_dtype is FP8 else "")
    width = heads.kv_heads * heads.group * heads.head_dim
    cache, query, out = _cache(heads, cache_dtype), _bf16(8, width), _bf16(8, width)
    tokens = query_tokens_per_tile(heads.group, rows_per_tile(heads.head_dim))
    places = SequencePlaces(_i32(9), _i32(8), _i32(8), _i32(8, 64))
    token_places = TokenPlaces(_i32(8), _i32(8), _i32(8), _i32(8, 64))
    plan = PrefillPlan(_i32(4, 2), tokens)
    workspace = DecodeWorkspace.allocate(8, heads.kv_heads * heads.group, 8, heads.head_dim, query.device)
    norm = HeadNorm(_f32(heads.head_dim), _f32(heads.head_dim), 1e-6)
    qkv = _bf16(8, (heads.group + 2) * heads.kv_heads * heads.head_dim)

    def write(norm: HeadNorm | None) -> None:
        num_heads = heads.kv_heads * heads.group
        table = _f32(64, heads.head_dim)
        rope_and_write(qkv, query, cache, token_places, table, num_query_heads=num_heads, norm=norm)

    def decode() -> None:
        decode_attention(query, cache, out, places, _i32(8), heads.shape, workspace, 8)

    yield Case(f"prefill, {name}", lambda: prefill_attention(query, cache, out, places, plan, heads.shape), minimum)
    yield Case(f"decode, {name}", decode, minimum)
    yield Case(f"rope and write, {name}", lambda: write(None), minimum)
    yield Case(f"rope and write with head norms, {name}", lambda: write(norm), minimum)


def _sample() -> None:
    rows = SamplingRows(_f32(4), _i32(4), _f32(4), _f32(4), torch.zeros(4, dtype=torch.int64))
    sample(_f32(4, 128256), rows, _i32(4))


def _experts(num_rows: int) -> None:
    # 128 experts, 8 a token; few of them here, as the kernel sees only strides and the rows a tile
    weights = ExpertWeights(_bf16(max(num_rows // 64, 4), 1536, 2048), _bf16(max(num_rows // 64, 4), 2048, 768))
    chosen = torch.zeros((num_rows // 4, 4), dtype=torch.int64)
    run_experts(_bf16(num_rows // 4, 2048), chosen, _f32(num_rows // 4, 4), weights)


def _coded(bits: int, group_size: int, num_rows: int, table: torch.Tensor | None = None) -> None:
    codes = torch.zeros((32, 4096, 64 * bits // 4), dtype=torch.uint8)
    groups = 4096 // group_size
    zeros = torch.zeros((4096, groups), dtype=torch.uint8) if table is None and bits == 4 else None
    weight = CodedWeight(codes, _bf16(4096, groups), zeros, bits, group_size, 4096, 128, table)
    coded_linear(_bf16(num_rows, 4096), weight, 132)


def _fp8(num_rows: int, block: int) -> None:
    scales = _f32(32, 32) if block else _f32(4096, 1)
    weight = Fp8Weight(_bf16(4096, 4096).to(FP8), scales, block or 1, block)
    fp8_linear(_bf16(num_rows, 4096).to(FP8), _f32(num_rows, 32 if block else 1), weight, BF16)


def markdown() -> str:
    found: dict[tuple[str, str], dict[int, CompiledLaunch]] = {}
    for capability in CAPABILITIES:
        for what, launch in compile_cases(capability):
            found.setdefault((what, launch.kernel.strip("_").removesuffix("_kernel")), {})[capability] = launch
    lines = [
        "# GPU kernels as compiled",
        "",
        f"Written by `python -m enginehouse_backends.llm.kernels.report` on {date.today()} with Triton "
        f"{triton.__version__} and its ptxas, without a GPU: each kernel exactly as its launcher would launch "
        "it. Cells: registers a thread · spilled bytes (if any) · shared memory in KiB · warps · matrix "
        "instructions. A dash: the target can't (FP8 needs sm_89).",
        "",
        "| Launch | Kernel | " + " | ".join(f"sm_{capability}" for capability in CAPABILITIES) + " |",
        "|---|---|" + "---|" * len(CAPABILITIES),
    ]
    for (what, kernel), launches in found.items():
        row = [_cell(launches.get(capability)) for capability in CAPABILITIES]
        lines.append(f"| {what} | {kernel} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _cell(launch: CompiledLaunch | None) -> str:
    if launch is None:
        return "–"
    spilled = f" · **{launch.spilled_bytes} spilled**" if launch.spilled_bytes else ""
    matrix = f" · {launch.matrix_instructions}" if launch.matrix_instructions else ""
    return f"{launch.registers}{spilled} · {launch.shared_bytes / 1024:.0f} · {launch.num_warps}{matrix}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), "utf-8")
