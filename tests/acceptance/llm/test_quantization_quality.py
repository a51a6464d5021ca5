"""What coarser weights cost on text that a model was not trained on, as perplexity. Prints the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from enginehouse_backends.llm.architecture import read_architecture
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.dense import load_dense
from enginehouse_backends.llm.layers import Build
from enginehouse_backends.llm.models import build_model
from enginehouse_backends.llm.quantization.linears import Place
from enginehouse_backends.llm.quantization.loading import plan_quantization, quantized_loader
from tests.acceptance.llm.test_models import chunked_logits
from tests.acceptance.llm.test_quantized_models import quantize_folder
from tests.acceptance.llm.trained_model import perplexity, train

# How much worse each may make it, in percent; about twice what was seen (docs/quantization.md has the figures).
ROUNDED = {"int8": 0.2, "int4": 0.6, "fp8": 0.8}
STORED = {
    "gptq": 1.2, "gptq 8 bits": 0.2, "awq": 1.2, "compressed-tensors": 2.0, "int8 by channel": 0.2,
    "bitsandbytes nf4": 1.5, "fp8 by tensor": 0.3, "fp8 by block": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(folder)


def measure(folder: Path, ids: torch.Tensor, rounding: str = "") -> float:
    architecture = read_architecture(folder)
    plan = plan_quantization(architecture.raw, rounding)
    model = build_model(Build(architecture, quantized_loader(plan, Place.TORCH, load_dense)))
    model.load(Checkpoint(folder))
    pairs = [chunked_logits(model, ids[first : first + 2].int(), cuts=[]) for first in range(0, len(ids), 2)]
    return perplexity(torch.cat(pairs), ids)


@pytest.mark.slow
@pytest.mark.timeout(300)
@torch.inference_mode()
def test_quantization_costs_little_perplexity(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, ids = trained
    plain = measure(folder, ids)
    print(f"\nfloat32: {plain:.4f}")
    assert plain < 9, "the model has not learnt enough to lose anything"
    found = {name: measure(folder, ids, name) for name in ROUNDED}
    for name in STORED:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        quantize_folder(copy, name)
        found[f"stored as {name}"] = measure(copy, ids)
    costs = {name: 100 * (value / plain - 1) for name, value in found.items()}
    print(json.dumps({name: f"{found[name]:.4f} ({cost:+.2f} %)" for name, cost in costs.items()}, indent=1))
    limits = {**ROUNDED, **{f"stored as {name}": limit for name, limit in STORED.items()}}
    assert {name: cost for name, cost in costs.items() if cost > limits[name]} == {}
    # the small model is trained anew on each processor, and differences this small go either way by chance
    assert costs["int8"] < costs["int4"] + 0.3, "eight bits should lose less than four"
