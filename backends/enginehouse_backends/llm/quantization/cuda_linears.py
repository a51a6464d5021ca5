"""Quantized linears on GPUs, over kernels/triton_quantized.py and torch's own scaled product where it is faster."""

from __future__ import annotations

import torch

from enginehouse_backends.llm.kernels.triton_quantized import (
    CHUNK,
    CodedWeight,
    Fp8Weight,
    coded_linear,
    fp8_linear,
    quantize_rows,
)
from enginehouse_backends.llm.layers import LinearKernel
from enginehouse_backends.llm.quantization.codes import Codes, regroup
from enginehouse_backends.llm.quantization.formats import Fp8Codes


class CodedCudaLinear(LinearKernel):
    """4- and 8-bit codes with float activations."""

    def __init__(self, codes: Codes, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        self.out_features = codes.num_outputs
        self._order = None if codes.order is None else codes.order.to(device)
        self._bias = None if bias is None else bias.to(device, dtype)
        self._weight = pack_for_triton(codes, device)
        self._num_units = multiprocessors(device)
        tensors = (self._weight.codes, self._weight.scales, self._weight.zeros, self._order, self._bias)
        self.num_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x if self._order is None else x.index_select(1, self._order)
        out = coded_linear(rows, self._weight, self._num_units)
        return out if self._bias is None else out + self._bias


def pack_for_triton(codes: Codes, device: torch.device) -> CodedWeight:
    """Codes as [chunk, output, bytes]: a block of outputs reads one run of memory a chunk."""
    if codes.group_size > CHUNK and codes.group_size % CHUNK == 0:
        codes = regroup(codes, CHUNK)
    outputs, inputs = codes.num_outputs, codes.num_inputs
    padded = torch.nn.functional.pad(codes.codes.to(device), (0, -inputs % CHUNK))
    chunks = padded.view(outputs, -1, CHUNK).transpose(0, 1)
    half = CHUNK // 2
    packed = chunks if codes.bits == 8 else chunks[..., :half] | (chunks[..., half:] << 4)
    return CodedWeight(
        packed.contiguous(),
        codes.scales.to(device).contiguous(),
        None if codes.zeros is None else codes.zeros.to(device).contiguous(),
        codes.bits,
        codes.group_size,
        inputs,
        codes.default_zero,
        None if codes.table is None else codes.table.to(device),
    )


class Fp8CudaLinear(LinearKernel):
    """FP8 weights and activations. Rows are rounded as they come, unless the checkpoint fixed their scale."""

    def __init__(self, weight: Fp8Codes, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        self.out_features = weight.weight.shape[0]
        self._dtype = dtype
        self._bias = None if bias is None else bias.to(device, dtype)
        block_rows, self._group = weight.block or (1 if weight.scales.shape[0] > 1 else self.out_features, 0)
        codes = weight.weight.to(device).contiguous()
        self._weight = Fp8Weight(codes, weight.scales.to(device).contiguous(), block_rows, self._group)
        self._input_scale = None
        if weight.input_scale is not None:
            self._input_scale = torch.tensor([[weight.input_scale]], dtype=torch.float32, device=device)
        self.num_bytes = codes.nbytes + self._weight.scales.nbytes
        self._torch_can = self._group == 0 and _torch_multiplies(device, dtype, codes)
        self._column_scales = torch.empty(0)
        if self._torch_can:
            self._column_scales = self._weight.scales.expand(self.out_features, 1).T.contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._input_scale is None:
            codes, scales = quantize_rows(x, self._group)
        else:
            scales = self._input_scale
            codes = (x.float() / scales).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        if self._torch_can:
            out = self._scaled_product(codes, scales)
        else:
            out = fp8_linear(codes, scales, self._weight, self._dtype)
        return out if self._bias is None else out + self._bias

    def _scaled_product(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        rows = codes.shape[0]
        row_scales = scales.expand(rows, 1).contiguous()
        out: torch.Tensor = torch._scaled_mm(
            codes, self._weight.weight.T, scale_a=row_scales, scale_b=self._column_scales, out_dtype=self._dtype
        )
        return out


def _torch_multiplies(device: torch.device, dtype: torch.dtype, codes: torch.Tensor) -> bool:
    """Whether torch's own product takes scales for each row and column: on Hopper and later, with sizes that cuBLAS
    and CUTLASS like."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return codes.shape[0] % 16 == 0 and codes.shape[1] % 16 == 0


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 1 for the simulated one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
