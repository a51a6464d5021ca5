"""Quantized checkpoints: readers against writers, and whole models against their dequantized weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from enginehouse.errors import EnginehouseError
from enginehouse_backends.llm.architecture import read_architecture
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.dense import load_dense
from enginehouse_backends.llm.layers import Build
from enginehouse_backends.llm.models import build_model
from enginehouse_backends.llm.quantization.formats import read_quantized
from enginehouse_backends.llm.quantization.linears import Place
from enginehouse_backends.llm.quantization.loading import plan_quantization, quantized_loader
from tests.acceptance.llm.quantized_checkpoints import FORMATS, Written, gptq, save
from tests.acceptance.llm.small_models import VOCAB, save_reference
from tests.acceptance.llm.test_models import chunked_logits
from tests.acceptance.llm.test_runner_cpu import Sequences, make_runner

BLOCK_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")


@pytest.mark.parametrize("name", FORMATS)
def test_readers_find_what_was_written(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    written: Written = FORMATS[name](torch.randn(160, 256))
    save(tmp_path, {"layer": written, "lm_head": torch.ones(2, 2)})
    checkpoint = Checkpoint(tmp_path)
    found = read_quantized(checkpoint, "layer", (160, 256), written.settings)
    assert found is not None
    # products of the same two numbers, in float32
    torch.testing.assert_close(found.dequantize(), written.dense, rtol=1e-6, atol=1e-7)
    assert read_quantized(checkpoint, "lm_head", (2, 2), written.settings) is None


def quantize_folder(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Rewrites a checkpoint's block linears in a format; gives the dense weights and config that it stands for."""
    weights = load_file(folder / "model.safetensors")
    dense, stored, settings = dict(weights), {}, {}
    for key, weight in weights.items():
        linear = key.removesuffix(".weight")
        if not linear.endswith(BLOCK_PARTS) or not key.endswith(".weight"):
            stored[key] = weight
            continue
        written: Written = FORMATS[name](weight.float())
        stored |= {f"{linear}.{suffix}": tensor.contiguous() for suffix, tensor in written.tensors.items()}
        dense[key], settings = written.dense, dict(written.settings)
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return dense, settings


def load_quantized(folder: Path, place: Place = Place.TORCH) -> Any:
    architecture = read_architecture(folder)
    loader = quantized_loader(plan_quantization(architecture.raw, ""), place, load_dense)
    model = build_model(Build(architecture, loader))
    model.load(Checkpoint(folder))
    return model


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Codes with 8-bit inputs: half a percent a product, over 21 products one after another; FP8 and NF4 are dequantized
# here, so nothing but float32 differs.
def _tolerance(name: str) -> float:
    return 1e-5 if name.startswith(("fp8", "bitsandbytes nf4")) else 0.03


@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_models_equal_their_dequantized_weights(name: str, tmp_path: Path) -> None:
    reference = save_reference("quantizable", tmp_path)
    dense, _ = quantize_folder(tmp_path, name)
    reference.load_state_dict(dense, strict=False)
    ids = torch.randint(0, VOCAB, (2, 20), dtype=torch.int32)
    found = chunked_logits(load_quantized(tmp_path), ids, cuts=[13])
    assert relative_error(found, reference(ids.long()).logits) < _tolerance(name)


@pytest.mark.parametrize("model", ["phi3-quantizable", "qwen3-moe-quantizable"])
@torch.inference_mode()
def test_fused_and_expert_linears_are_read_too(model: str, tmp_path: Path) -> None:
    save_reference(model, tmp_path / "dense")
    shutil.copytree(tmp_path / "dense", tmp_path / "quantized")
    dense, _ = quantize_folder(tmp_path / "quantized", "fp8 by channel")
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    auto: Any = transformers.AutoModelForCausalLM
    reference = auto.from_pretrained(tmp_path / "dense").eval()
    ids = torch.randint(0, VOCAB, (2, 20), dtype=torch.int32)
    found = chunked_logits(load_quantized(tmp_path / "quantized"), ids, cuts=[13])
    assert relative_error(found, reference(ids.long()).logits) < 1e-5


def test_unknown_methods_and_contradictions_are_refused_by_name() -> None:
    with pytest.raises(EnginehouseError, match="method 'quip' is not supported; known are gptq, awq"):
        plan_quantization({"quantization_config": {"quant_method": "quip"}}, "")
    with pytest.raises(EnginehouseError, match="asks to round a checkpoint that is quantized"):
        plan_quantization({"quantization_config": {"quant_method": "awq"}}, "int4")
    with pytest.raises(EnginehouseError, match="'quantization: awq' is not possible: the checkpoint is not quantized"):
        plan_quantization({}, "awq")
    assert plan_quantization({"quantization_config": {"quant_method": "gptq"}}, "gptq").is_active


def test_groups_that_do_not_fit_are_named(tmp_path: Path) -> None:
    written = gptq(torch.randn(16, 64), group_size=32)
    save(tmp_path, {"layer": written})
    with pytest.raises(EnginehouseError, match="64 inputs in groups of 16 don't make the 2 groups"):
        read_quantized(Checkpoint(tmp_path), "layer", (16, 64), {**written.settings, "group_size": 16})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["int8", "int4"])
def test_a_native_program_of_codes_equals_the_same_linears_in_torch(
    rounding: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_reference("quantizable", tmp_path)
    ids = torch.randint(0, VOCAB, (2, 20))
    found, expected = (
        Sequences(make_runner(tmp_path, native, dtype, rounding), ids).compute([(0, 0, 20), (1, 0, 9)])
        for native in (True, False)
    )
    for one, other in zip(found, expected, strict=True):
        # the same codes and rounded rows; an input that lies between two of 255 steps may fall to either side
        # (which one does depends on the width of the processor's vectors: 0.0108 with AVX2)
        assert relative_error(one, other) < (0.02 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("name", ["gptq reordered", "awq", "fp8 by block"])
def test_quantized_checkpoints_run_natively(name: str, tmp_path: Path) -> None:
    reference = save_reference("quantizable", tmp_path)
    dense, _ = quantize_folder(tmp_path, name)
    reference.load_state_dict(dense, strict=False)
    ids = torch.randint(0, VOCAB, (1, 20))
    (found,) = Sequences(make_runner(tmp_path, native=True), ids).compute([(0, 0, 20)])
    with torch.inference_mode():
        assert relative_error(found, reference(ids).logits[0]) < _tolerance(name)
