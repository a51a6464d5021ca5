"""Folders that can't be served say what is wrong with them; folders that can need no config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from enginehouse.backend import LoadContext
from enginehouse.config.schema import ModelConfig, ModelParameter
from enginehouse.errors import EnginehouseError, InvalidArgument, NotFound, ResourceExhausted, Unsupported
from enginehouse.types import FinishReason
from enginehouse_backends.llm.backend import LlmBackend
from tests.acceptance.llm.serving import GREEDY, Serving
from tests.acceptance.llm.small_models import save_reference, save_tokenizer

Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_reference("llama", folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(fields)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def drop_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)


def misshape_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)
    save_file(tensors, path)


def cut(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def lose_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, some in halves.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in halves.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    (folder / "b.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "kind", "text"),
    [
        (lambda f: (f / "config.json").unlink(), NotFound, "no Hugging Face folder"),
        (lambda f: (f / "config.json").write_text("{"), InvalidArgument, "config.json is no JSON"),
        (lambda f: change_config(f, hidden_size=None), InvalidArgument, "'hidden_size' is missing"),
        (lambda f: change_config(f, hidden_size="x"), InvalidArgument, "'hidden_size' must be a positive integer"),
        (lambda f: change_config(f, num_key_value_heads=3), InvalidArgument, "is no multiple of"),
        (lambda f: change_config(f, architectures=["NewForCausalLM"]), Unsupported, "'NewForCausalLM'"),
        (lambda f: change_config(f, rope_parameters={"rope_type": "spiral"}), Unsupported, "'spiral'"),
        (lambda f: (f / "model.safetensors").unlink(), NotFound, "no *.safetensors"),
        (drop_tensor, InvalidArgument, "no tensor 'model.layers.1.mlp.up_proj.weight'"),
        (misshape_tensor, InvalidArgument, "has shape [95, 64], config.json asks for [96, 64]"),
        (lambda f: cut(f, 5), InvalidArgument, "is cut short"),
        (lambda f: cut(f, 5000), InvalidArgument, "is cut short"),
        (lambda f: cut(f, 200_000), InvalidArgument, "the file has 200000 bytes"),
        (lose_shard, NotFound, "1 of 2 weight files are missing: b.safetensors"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), InvalidArgument, "is no tokenizer"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), InvalidArgument, "is no JSON"),
    ],
)
def test_broken_folders_say_what_is_wrong(spoil: Spoil, kind: type[EnginehouseError], text: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(kind) as caught:
        Serving(folder)
    assert text in str(caught.value)
    assert str(folder) in str(caught.value) or "rotary" in text or kind is Unsupported


def test_a_model_that_fails_to_load_leaves_others_alone(good: Path, folder: Path) -> None:
    serving = Serving(good, "good")
    before = serving.generate([1, 2, 3])
    drop_tensor(folder)
    with pytest.raises(InvalidArgument):
        Serving(folder, "bad")
    assert serving.generate([1, 2, 3]).token_ids == before.token_ids
    serving.close()


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"max_model_len": 1000}, InvalidArgument, "max_model_len 1000 is more than the 256 positions"),
        ({"dtype": "int3"}, InvalidArgument, "dtype 'int3' is none of"),
        ({"kv_bytes": 1 << 50}, ResourceExhausted, "1048576.00 GiB for KV"),
        ({"kv_bytes": 100_000, "max_model_len": 256}, ResourceExhausted, "a context of 256 tokens needs"),
        ({"parameters": {"num_threads": "many"}}, InvalidArgument, "'num_threads' must be a whole number"),
        ({"chat_template": "missing.jinja"}, InvalidArgument, "there is no file 'missing.jinja'"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: dict[str, Any], kind: type[EnginehouseError], text: str, good: Path
) -> None:
    with pytest.raises(kind) as caught:
        Serving(good, **settings)
    assert text in str(caught.value)


def test_the_context_is_cut_to_what_the_memory_holds(good: Path) -> None:
    serving = Serving(good, kv_bytes=100_000)
    with pytest.raises(InvalidArgument, match="context of 130 must hold it"):
        serving.submit([1] * 200)
    serving.close()


def test_tritons_model_json_names_the_folder_and_arguments(good: Path, tmp_path: Path) -> None:
    version = tmp_path / "1"
    version.mkdir()
    arguments = {"model": str(good), "max_model_len": 100, "gpu_memory_utilization": 0.5, "enforce_eager": True}
    (version / "model.json").write_text(json.dumps(arguments))
    serving = Serving(tmp_path)
    with pytest.raises(InvalidArgument, match="context of 100"):
        serving.submit([1] * 100)
    assert serving.generate("hello").finish_reason is FinishReason.LENGTH
    serving.close()
    (version / "model.json").write_text("[]")
    with pytest.raises(InvalidArgument, match=r"model\.json must hold a JSON object"):
        Serving(tmp_path)
    (version / "model.json").write_text('{"model": "./nowhere"}')
    with pytest.raises(NotFound, match="nowhere"):
        Serving(tmp_path)


def test_the_config_is_completed_with_the_tensors_of_tritons_vllm_backend(good: Path) -> None:
    config = LlmBackend().complete_config(LoadContext(ModelConfig(name="m"), 1, good))
    assert [tensor.name for tensor in config.input][:3] == ["text_input", "stream", "sampling_parameters"]
    assert config.output[0].name == "text_output"
    assert config.model_transaction_policy.decoupled
    assert config.max_batch_size == 0


def test_memory_needs_are_told_without_loading(good: Path) -> None:
    config = ModelConfig(name="m")
    config.serving.memory.kv_bytes = 1 << 20
    config.parameters["num_threads"].CopyFrom(ModelParameter(string_value="1"))
    needs = LlmBackend().memory_needs(LoadContext(config, 1, good))
    assert needs.kv_bytes == 1 << 20
    weights = sum(tensor.nbytes for tensor in load_file(good / "model.safetensors").values())
    assert needs.weights_bytes == weights


def test_bfloat16_and_float16_checkpoints_are_served(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        save_reference("llama", folder, dtype)
        serving = Serving(folder)
        assert len(serving.generate([1, 2, 3], GREEDY).token_ids) == 24
        serving.close()
