"""Each family's logits against transformers, through paged attention in shuffled blocks and in chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from enginehouse.errors import EnginehouseError
from enginehouse_backends.llm.architecture import read_architecture
from enginehouse_backends.llm.attention import PLACE_BYTES, KvShape, StepBatch
from enginehouse_backends.llm.attention.gather import GatherAttention
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.dense import load_dense
from enginehouse_backends.llm.layers import Build
from enginehouse_backends.llm.models import DecoderModel, build_model
from tests.acceptance.llm.small_models import CONFIGS, SHAPE, VOCAB, make_reference, save_reference

BLOCK_SIZE = 4
NUM_BLOCKS = 64


def load_model(folder: Path) -> DecoderModel:
    model = build_model(Build(read_architecture(folder), load_dense))
    model.load(Checkpoint(folder))
    return model


def chunked_logits(model: DecoderModel, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Logits of all positions of two sequences that are computed side by side, chunk by chunk."""
    architecture, backend = model.build.architecture, GatherAttention()
    shape = KvShape(
        architecture.num_layers, architecture.num_kv_heads, architecture.head_dim, BLOCK_SIZE, torch.float32
    )
    block_bytes = backend.block_bytes(shape)
    arena = torch.zeros(NUM_BLOCKS * block_bytes, dtype=torch.uint8)
    places = torch.randperm(NUM_BLOCKS).reshape(2, -1).to(torch.int32) * (block_bytes // PLACE_BYTES)
    chunks = []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        size = stop - start
        step = StepBatch(
            tokens=ids[:, start:stop].reshape(-1),
            positions=torch.arange(start, stop, dtype=torch.int32).repeat(2),
            query_starts=torch.tensor([0, size, 2 * size], dtype=torch.int32),
            context_lengths=torch.tensor([stop, stop], dtype=torch.int32),
            block_places=places,
            wanted_rows=torch.arange(2 * size),
            arena=arena,
            kv_shape=shape,
            attention=backend,
            max_query=size,
            max_context=stop,
        )
        logits = model.forward(step.tokens, step)
        assert isinstance(logits, torch.Tensor)
        chunks.append(logits.reshape(2, size, -1))
    return torch.cat(chunks, dim=1)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = save_reference(name, tmp_path)
    ids = torch.randint(0, VOCAB, (2, 30), dtype=torch.int32)
    logits = chunked_logits(load_model(tmp_path), ids, cuts=[13, 29])
    expected = reference(ids.long()).logits
    # float32 sums in another order: some thousand roundings of 6e-8 each
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    save_reference("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "UnheardOfForCausalLM"))
    with pytest.raises(EnginehouseError, match=r"'UnheardOfForCausalLM' is not supported; known are .*Llama"):
        load_model(tmp_path)


@torch.inference_mode()
def test_the_decoder_of_a_multimodal_checkpoint_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    reference = save_reference("gemma3", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {f"language_model.{name}": weight for name, weight in weights.items()}
    save_file({**renamed, "vision_tower.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    wrapped = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    (tmp_path / "config.json").write_text(json.dumps(wrapped))
    ids = torch.randint(0, VOCAB, (2, 30), dtype=torch.int32)
    logits = chunked_logits(load_model(tmp_path), ids, cuts=[])
    torch.testing.assert_close(logits, reference(ids.long()).logits, rtol=1e-4, atol=1e-4)


def test_a_model_with_a_recurrent_state_is_refused_while_loading(tmp_path: Path) -> None:
    make: Any = transformers.FalconH1Config
    config = make(**SHAPE, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8)
    make_reference(config).save_pretrained(tmp_path)
    with pytest.raises(EnginehouseError, match="keeps more than keys and values"):
        load_model(tmp_path)
