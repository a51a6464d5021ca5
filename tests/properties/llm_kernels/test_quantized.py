"""Products with quantized weights against the dequantized weight in float64."""

from __future__ import annotations

import pytest
import torch

from enginehouse_backends.llm.kernels.triton_quantized import (
    CHUNK,
    CodedWeight,
    Fp8Weight,
    choose_splits,
    coded_linear,
    fp8_linear,
    quantize_rows,
)

from .references import relative_error


def _random_codes(columns: int, depth: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [columns, depth], and the same packed."""
    codes = torch.randint(0, 2**bits, (columns, depth), dtype=torch.uint8)
    padded = torch.nn.functional.pad(codes, (0, -depth % CHUNK))
    chunks = padded.view(columns, -1, CHUNK).transpose(0, 1)
    if bits == 8:
        return codes, chunks.contiguous()
    return codes, (chunks[..., :64] | (chunks[..., 64:] << 4)).contiguous()


# bfloat16 activations are exact inputs here; what is rounded is the result (2^-9) and, for groups of 32, the
# dequantized weight (2^-9 each, averaging out over the sum)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)], ids=str)
@pytest.mark.parametrize("with_zeros", [True, False], ids=["zeros", "symmetric"])
@pytest.mark.parametrize(
    ("bits", "group_size", "depth"), [(4, 128, 512), (4, 32, 256), (4, 64, 320), (8, 128, 384), (8, 32, 160)]
)
def test_coded_linear(
    bits: int, group_size: int, depth: int, with_zeros: bool, dtype: torch.dtype, tolerance: float
) -> None:
    columns, rows = 80, 3
    codes, packed = _random_codes(columns, depth, bits)
    groups = -(-depth // group_size)
    scales = torch.rand(columns, groups) * 0.1 + 0.01
    zeros = torch.randint(0, 2**bits, (columns, groups), dtype=torch.uint8) if with_zeros else None
    default_zero = 2 ** (bits - 1)
    weight = CodedWeight(packed, scales, zeros, bits, group_size, depth, default_zero)
    spread = torch.arange(depth) // group_size
    zero = zeros[:, spread].double() if zeros is not None else default_zero
    dense = (codes.double() - zero) * scales[:, spread].double()
    x = torch.randn(rows, depth).to(dtype)
    assert relative_error(coded_linear(x, weight, 4), x.double() @ dense.T) < tolerance


def test_splits_are_summed_and_rows_are_tiled() -> None:
    codes, packed = _random_codes(64, 2048, 4)
    weight = CodedWeight(packed, torch.full((64, 16), 0.1), None, 4, 128, 2048, 8)
    dense = (codes.double() - 8) * 0.1
    assert choose_splits(1, 16, 132) == 4
    for rows in (2, 40):
        x = torch.randn(rows, 2048)
        assert relative_error(coded_linear(x, weight, 132), x.double() @ dense.T) < 2e-6


def test_codebook() -> None:
    codes, packed = _random_codes(40, 256, 4)
    table, scales = torch.linspace(-1, 1, 16) ** 3, torch.rand(40, 4) + 0.5
    weight = CodedWeight(packed, scales, None, 4, 64, 256, table=table)
    dense = table[codes.long()].double() * scales.double().repeat_interleave(64, 1)
    x = torch.randn(5, 256)
    assert relative_error(coded_linear(x, weight, 1), x.double() @ dense.T) < 2e-6


@pytest.mark.parametrize("group_size", [0, 128])
def test_quantized_rows_are_the_nearest_codes(group_size: int) -> None:
    x = torch.randn(4, 384) * torch.tensor([1e-3, 1.0, 50.0, 0.0])[:, None]
    codes, scales = quantize_rows(x, group_size)
    spread = scales.repeat_interleave(group_size, 1) if group_size else scales
    assert torch.equal(codes.float(), (x / spread).to(torch.float8_e4m3fn).float())
    largest = codes.float().abs().view(4, -1, group_size or 384).amax(-1)
    assert (largest[:3] == 448).all(), "the range is not used up"


@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
@pytest.mark.parametrize("rows", [3, 70])
def test_fp8_linear(kind: str, rows: int) -> None:
    columns, depth = 200, 256
    stored = torch.randn(columns, depth).to(torch.float8_e4m3fn)
    shape, block_rows, block_depth = {
        "tensor": ((1, 1), columns, 0),
        "channel": ((columns, 1), 1, 0),
        "block": ((2, 2), 128, 128),
    }[kind]
    scales = torch.rand(shape) + 0.5
    weight = Fp8Weight(stored, scales, block_rows, block_depth)
    expanded = scales.repeat_interleave(block_rows, 0)[:columns]
    dense = stored.double() * (expanded.repeat_interleave(block_depth, 1) if block_depth else expanded).double()
    codes, x_scales = quantize_rows(torch.randn(rows, depth), block_depth)
    x = codes.double() * (x_scales.repeat_interleave(block_depth, 1) if block_depth else x_scales).double()
    # the codes are the inputs: only float32 sums round
    assert relative_error(fp8_linear(codes, x_scales, weight, torch.float32), x @ dense.T) < 2e-6
