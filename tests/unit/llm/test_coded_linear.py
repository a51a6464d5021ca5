"""Linears of 4- and 8-bit codes on the CPU against their dequantized weights."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from enginehouse.errors import Unsupported  # noqa: E402
from enginehouse_backends.llm.kernels.build import NoKernels, kernel_library  # noqa: E402
from enginehouse_backends.llm.quantization.codes import Codes  # noqa: E402
from enginehouse_backends.llm.quantization.rounding import round_weight  # noqa: E402

try:
    kernel_library()
except NoKernels as error:
    pytest.skip(str(error), allow_module_level=True)

from enginehouse_backends.llm.native_coded import NativeCodedLinear  # noqa: E402


def _codes(outputs: int, inputs: int, bits: int, group_size: int, zeros: bool, shuffled: bool = False) -> Codes:
    groups = -(-inputs // group_size)
    return Codes(
        torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8),
        torch.rand(outputs, groups) * 0.02 + 1e-4,
        torch.randint(0, 2**bits, (outputs, groups), dtype=torch.uint8) if zeros else None,
        bits,
        group_size,
        2 ** (bits - 1),
        order=torch.randperm(inputs) if shuffled else None,
    )


def _error(codes: Codes, rows: int, bias: bool = False) -> float:
    x, offset = torch.randn(rows, codes.num_inputs), torch.randn(codes.num_outputs) if bias else None
    found = NativeCodedLinear(codes, offset)(x).double()
    expected = x.double() @ codes.dequantize().double().T
    expected = expected if offset is None else expected + offset
    return float((found - expected).norm() / expected.norm())


# Rounding the inputs to 8 bits in groups of 32 costs 0.5 % of a product's size (a step of 1/127 of about 2.1
# standard deviations, uniformly off by up to half of it), up to twice that in a sample of so few rows;
# half-precision scales cost 0.02 %.
_TOLERANCE = 0.012


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group_size"), [(64, 128, 32), (200, 256, 128), (65, 320, 64), (33, 896, 896), (8, 48, 48)]
)
def test_product_is_within_the_rounding_of_its_inputs(
    outputs: int, inputs: int, group_size: int, bits: int, zeros: bool
) -> None:
    torch.manual_seed(outputs)
    if group_size % 32:
        with pytest.raises(Unsupported, match="groups of 48"):
            NativeCodedLinear(_codes(outputs, inputs, bits, group_size, zeros), None)
        return
    codes = _codes(outputs, inputs, bits, group_size, zeros)
    for rows in (1, 3, 8, 19):
        assert _error(codes, rows, bias=rows == 3) < _TOLERANCE


def test_inputs_in_another_order_are_put_right() -> None:
    torch.manual_seed(3)
    assert _error(_codes(70, 256, 4, 128, zeros=True, shuffled=True), 5) < _TOLERANCE


def test_rounded_inputs_are_exact_where_they_fit() -> None:
    codes = _codes(64, 64, 4, 32, zeros=True)
    x = torch.randint(-127, 128, (2, 64)).float()
    x[:, ::32] = 127.0  # so that the scale is 1
    found, expected = NativeCodedLinear(codes, None)(x), x.double() @ codes.dequantize().double().T
    # half-precision scales alone: 2^-11 each
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2**-11 * float(expected.abs().max()) * 4)


def test_a_row_is_the_same_alone_and_among_others() -> None:
    linear = NativeCodedLinear(_codes(100, 256, 4, 32, zeros=False), None)
    x = torch.randn(11, 256)
    together = linear(x)
    for row in range(11):
        assert torch.equal(linear(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize(("bits", "error"), [(8, 0.006), (4, 0.095)])
def test_rounding_a_weight_costs_what_its_bits_allow(bits: int, error: float) -> None:
    """A Gaussian weight in groups of 32: a quarter bit short of the best uniform quantizer (0.089 at 4 bits)."""
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    found = round_weight(weight, bits, 32).dequantize()
    assert float((found - weight).norm() / weight.norm()) < error


def test_an_all_zero_group_stays_zero() -> None:
    weight = torch.randn(4, 64)
    weight[:, :32] = 0
    assert (round_weight(weight, 4, 32).dequantize()[:, :32] == 0).all()
