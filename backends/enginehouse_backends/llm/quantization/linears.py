"""Linears with quantized weights: on GPUs by the Triton kernels, elsewhere by the native ones or dequantized."""

from __future__ import annotations

from enum import Enum

import torch

from enginehouse_backends.llm.dense import DenseLinear, PackedLinear, can_pack
from enginehouse_backends.llm.kernels.build import NoKernels
from enginehouse_backends.llm.layers import LinearKernel
from enginehouse_backends.llm.quantization.codes import Codes
from enginehouse_backends.llm.quantization.formats import Fp8Codes

_MINIMUM_FP8_CAPABILITY = (8, 9)


class Place(Enum):
    """Where a linear is to run."""

    NATIVE = "a native program of the CPU"
    TORCH = "torch on a CPU"
    CUDA = "a GPU"


def make_linear(
    weight: Codes | Fp8Codes, bias: torch.Tensor | None, place: Place, dtype: torch.dtype, device: torch.device
) -> LinearKernel:
    """`dtype` is that of the activations."""
    if place is Place.CUDA:
        return _cuda_linear(weight, bias, dtype, device)
    if isinstance(weight, Codes) and weight.table is None and weight.group_size % 32 == 0:
        from enginehouse_backends.llm.native_coded import NativeCodedLinear

        try:
            return NativeCodedLinear(weight, bias)
        except NoKernels:
            pass  # said already by whoever asked for the kernels; dequantized is right, if slow and large
    return make_dense(weight.dequantize().to(dtype), bias, place, dtype)


def make_dense(weight: torch.Tensor, bias: torch.Tensor | None, place: Place, dtype: torch.dtype) -> LinearKernel:
    """weight: [outputs, inputs] in the activations' type."""
    if place is Place.NATIVE:
        from enginehouse_backends.llm.native_linear import NativeLinear, padded_bias

        packed = NativeLinear(dtype, weight.shape[0], weight.shape[1])
        packed.put(weight, 0)
        packed.bias = None if bias is None else padded_bias(bias)
        return packed
    bias = None if bias is None else bias.to(dtype)
    if place is Place.TORCH and can_pack(dtype):
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)


def _cuda_linear(
    weight: Codes | Fp8Codes, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> LinearKernel:
    from enginehouse_backends.llm.quantization.cuda_linears import CodedCudaLinear, Fp8CudaLinear

    if isinstance(weight, Codes):
        return CodedCudaLinear(weight, bias, dtype, device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _MINIMUM_FP8_CAPABILITY:
        bias = None if bias is None else bias.to(device, dtype)
        return DenseLinear(weight.dequantize().to(device, dtype), bias)
    return Fp8CudaLinear(weight, bias, dtype, device)
