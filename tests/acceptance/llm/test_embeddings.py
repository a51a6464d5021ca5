"""Decoders that embed: through the engine, pooled by last token or mean, and over /v1/embeddings."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from enginehouse.errors import InvalidArgument
from enginehouse.testing.server import ServerProcess
from enginehouse.types import GenerateTask
from tests.acceptance.llm.serving import Serving
from tests.acceptance.llm.small_models import save_reference, save_tokenizer
from tests.unit.backends import hugging_face_folders

PROMPTS = ([5, 250, 17, 3], list(range(20, 61)), [9] * 11)


def make_embedder(folder: Path, name: str, pooling: str, normalizes: bool = True) -> Any:
    """As sentence-transformers saves it."""
    reference = save_reference(name, folder)
    kinds = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    kinds += ["sentence_transformers.models.Normalize"] if normalizes else []
    (folder / "modules.json").write_text(json.dumps([{"idx": i, "type": kind} for i, kind in enumerate(kinds)]))
    (folder / "1_Pooling").mkdir()
    modes = {"lasttoken": False, "mean_tokens": False, "cls_token": False, pooling: True}
    settings = {f"pooling_mode_{mode}": value for mode, value in modes.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **settings}))
    return reference


@torch.inference_mode()
def expected_of(reference: Any, prompt: list[int], pooling: str, normalizes: bool = True) -> Any:
    hidden = reference.model(torch.tensor([prompt])).last_hidden_state[0]
    vector = hidden[-1] if pooling == "lasttoken" else hidden.mean(0)
    return (vector / vector.norm() if normalizes else vector).numpy()


def embed(serving: Serving, prompts: Any) -> list[Any]:
    ids = [serving.submit(prompt, task=GenerateTask.EMBED, stream=False) for prompt in prompts]
    return [np.frombuffer(serving.result(request_id).last.embedding, dtype="<f4") for request_id in ids]


@pytest.mark.parametrize(
    ("name", "pooling", "device"),
    [
        ("qwen3", "lasttoken", "cpu"),
        ("qwen3", "mean_tokens", "cpu"),
        ("gemma3", "mean_tokens", "cpu"),
        ("llama", "lasttoken", "simulated:0"),
        ("mistral", "mean_tokens", "simulated:0"),
    ],
)
@pytest.mark.timeout(240)
def test_vectors_are_transformers_whatever_the_chunks(name: str, pooling: str, device: str, tmp_path: Path) -> None:
    normalizes = name != "llama"
    reference = make_embedder(tmp_path, name, pooling, normalizes)
    # prompts of 41 tokens in steps of 16
    settings: dict[str, Any] = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "max_model_len": 64}
    serving = Serving(tmp_path, kv_bytes=32 << 20, device=device, **settings)
    try:
        found = embed(serving, PROMPTS)
        serving.check()
        with pytest.raises(InvalidArgument, match="makes embeddings and generates no text"):
            serving.submit(PROMPTS[0])
    finally:
        serving.close()
    for prompt, vector in zip(PROMPTS, found, strict=True):
        np.testing.assert_allclose(vector, expected_of(reference, prompt, pooling, normalizes), rtol=2e-3, atol=2e-4)


def test_a_decoder_saved_without_its_head_embeds(tmp_path: Path) -> None:
    reference = make_embedder(tmp_path, "qwen3", "lasttoken")
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    save_file(bare, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3Model"]}))
    serving = Serving(tmp_path)
    try:
        [found] = embed(serving, PROMPTS[:1])
    finally:
        serving.close()
    np.testing.assert_allclose(found, expected_of(reference, PROMPTS[0], "lasttoken"), rtol=2e-3, atol=2e-4)


# --- over HTTP


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    repository = tmp_path_factory.mktemp("models")
    reference = make_embedder(repository / "embedder", "qwen3", "lasttoken")
    save_tokenizer(repository / "embedder")
    (repository / "embedder" / "config.pbtxt").write_text('backend: "llm"')
    save_reference("llama", repository / "writer")
    save_tokenizer(repository / "writer")
    hugging_face_folders.write_bert(repository / "encoder", "BertModel")
    hugging_face_folders.write_sentence_modules(repository / "encoder", "pooling_mode_mean_tokens", True)
    return repository, reference


@pytest.fixture(scope="module")
def client(folders: tuple[Path, Any]) -> Iterator[openai.OpenAI]:
    with ServerProcess([folders[0]]) as server:
        yield openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0)


def test_texts_and_token_ids_are_embedded_in_order(client: openai.OpenAI, folders: tuple[Path, Any]) -> None:
    texts = ["a cat", "a much longer text about a cat on a mat"]
    answer = client.embeddings.create(model="embedder", input=texts, encoding_format="float")
    expected = [expected_of(folders[1], list(text.encode()), "lasttoken") for text in texts]
    np.testing.assert_allclose([row.embedding for row in answer.data], expected, rtol=2e-3, atol=2e-4)
    assert [row.index for row in answer.data] == [0, 1]
    assert answer.usage.prompt_tokens == sum(map(len, texts))
    # the package's own default is base64
    same = client.embeddings.create(model="embedder", input=[list(text.encode()) for text in texts])
    np.testing.assert_allclose([row.embedding for row in same.data], expected, rtol=2e-3, atol=2e-4)


def test_fewer_dimensions_are_as_long_as_1_again(client: openai.OpenAI) -> None:
    whole = client.embeddings.create(model="embedder", input="a cat", encoding_format="float").data[0].embedding
    cut = client.embeddings.create(model="embedder", input="a cat", dimensions=8, encoding_format="float")
    found = np.array(cut.data[0].embedding)
    np.testing.assert_allclose(found, np.array(whole[:8]) / np.linalg.norm(whole[:8]), rtol=1e-5)


def test_an_encoder_of_the_transformers_backend_answers_too(client: openai.OpenAI) -> None:
    one, two = (
        client.embeddings.create(model="encoder", input=given, encoding_format="float").data
        for given in ("a cat", ["a dog", "a cat"])
    )
    np.testing.assert_allclose(one[0].embedding, two[1].embedding, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"model": "writer", "input": "a"}, "generates text and makes no embeddings"),
        ({"model": "nobody", "input": "a"}, "does not exist"),
        ({"model": "embedder", "input": []}, "input"),
        ({"model": "embedder", "input": "a", "dimensions": 65}, "65 is not between 1 and the model's 64"),
        ({"model": "encoder", "input": [[1, 2]]}, "takes no token ids"),
    ],
)
def test_what_cannot_be_embedded_is_refused(client: openai.OpenAI, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(openai.APIStatusError, match=told):
        client.embeddings.create(encoding_format="float", **asked)


def test_base64_is_little_endian_float32(client: openai.OpenAI) -> None:
    raw = client.embeddings.with_raw_response.create(model="embedder", input="a cat", encoding_format="base64")
    document = json.loads(raw.text)
    vector = np.frombuffer(base64.b64decode(document["data"][0]["embedding"]), dtype="<f4")
    assert vector.shape == (64,)
    assert float(np.linalg.norm(vector)) == pytest.approx(1.0, abs=1e-4)
