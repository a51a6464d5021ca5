"""Quantized checkpoints through the GPU's linears: each format against its dequantized weights, and served.

Simulated here; with ENGINEHOUSE_TEST_DEVICE=cuda:0 (`python -m tests.gpu llm-quantized`) on a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from enginehouse.types import SamplingParameters
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.quantization.formats import read_quantized
from enginehouse_backends.llm.quantization.linears import Place, make_linear
from tests.acceptance.llm.quantized_checkpoints import FORMATS, Written, save
from tests.acceptance.llm.serving import Serving
from tests.acceptance.llm.small_models import VOCAB, save_reference
from tests.acceptance.llm.test_quantized_models import quantize_folder, relative_error

DEVICE = os.environ.get("ENGINEHOUSE_TEST_DEVICE", "simulated:0")
ON_GPU = DEVICE.startswith("cuda")
TORCH_DEVICE = torch.device(DEVICE if ON_GPU else "cpu")
if not ON_GPU:
    from enginehouse_backends.llm.kernels import interpreting

    interpreting.install()
SERVED = ("awq", "gptq reordered", "compressed-tensors with zeros", "bitsandbytes nf4", "fp8 by block")


# codes multiply float32 inputs as they are; FP8 rounds the inputs, too: 3 bits of mantissa, at random
@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_a_linear_equals_its_dequantized_weight(name: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    written: Written = FORMATS[name](torch.randn(160, 256))
    save(tmp_path, {"layer": written})
    weight = read_quantized(Checkpoint(tmp_path), "layer", (160, 256), written.settings)
    assert weight is not None
    linear = make_linear(weight, None, Place.CUDA, torch.float32, TORCH_DEVICE)
    x = torch.randn(7, 256)
    found = linear(x.to(TORCH_DEVICE)).cpu().double()
    tolerance = 0.05 if name.startswith("fp8") else 1e-5
    assert relative_error(found, x.double() @ written.dense.double().T) < tolerance


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", SERVED)
def test_a_checkpoint_is_served_as_it_is(name: str, tmp_path: Path) -> None:
    reference = save_reference("quantizable", tmp_path)
    dense, _ = quantize_folder(tmp_path, name)
    reference.load_state_dict(dense, strict=False)
    prompt = torch.randint(0, VOCAB, (9,)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    serving = Serving(tmp_path, device=DEVICE, kv_bytes=32 << 20, max_model_len=64)
    try:
        # the host looks at these logits, so they are seen as they are
        result = serving.generate(prompt, SamplingParameters(temperature=0.0, max_tokens=1, logprobs=5))
    finally:
        serving.close()
    found = {entry.token_id: entry.logprob for entry in result.logprobs[0]}
    tolerance = 0.5 if name.startswith("fp8") else 1e-3
    for token_id, logprob in found.items():
        assert logprob == pytest.approx(float(expected[token_id]), abs=tolerance)
