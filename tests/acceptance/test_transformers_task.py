"""The transformers backend: folders served without a line of code, with transformers itself as the reference."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from google.protobuf import text_format
from PIL import Image

from enginehouse.backend import LoadContext, Placement, TensorInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError, InvalidArgument, NotFound, Unsupported
from enginehouse.types import Tensor
from enginehouse_backends.transformers_task import TransformersBackend
from tests.unit.backends import hugging_face_folders as folders

BACKEND = TransformersBackend()
TEXTS = ["the cat", "a dog sits on the mat", "", "how long is bread baked in berlin " * 30, "words", "anna lives"]


def context_of(folder: Path, text: str = "") -> LoadContext:
    config: ModelConfig = text_format.Parse(f'name: "m" {text}', ModelConfig())
    return LoadContext(BACKEND.complete_config(LoadContext(config, 1, folder)), 1, folder)


def instance_of(folder: Path, text: str = "") -> TensorInstance:
    instance = BACKEND.load(context_of(folder, text)).create_instance(Placement("m_0"))
    assert isinstance(instance, TensorInstance)
    return instance


def column(name: str, texts: list[Any]) -> dict[str, Tensor]:
    rows = [[text.encode() if isinstance(text, str) else text] for text in texts]
    return {name: Tensor.from_numpy(name, np.array(rows, dtype=object).reshape(-1, 1))}


def values(results: Any, name: str) -> list[Any]:
    array = results[name].numpy().reshape(-1)
    return [element.decode() if isinstance(element, bytes) else float(element) for element in array]


def tokens_of(folder: Path, text: str, pair: str | None = None) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(text, pair, truncation=True, max_length=64, return_tensors="pt")


# --- embeddings ----------------------------------------------------------------------------------------


def reference_embedding(model: Any, folder: Path, text: str, kind: str) -> Any:
    tokens = tokens_of(folder, text)
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state[0]
    return {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "last": hidden[-1]}[kind].numpy()


@pytest.mark.parametrize("kind", ["mean", "cls", "max", "last"])
def test_embedding_of_each_text_in_a_batch_is_that_of_the_text_alone(tmp_path: Path, kind: str) -> None:
    model = folders.write_bert(tmp_path / "1", "BertModel")
    text = f'parameters {{ key: "pooling" value {{ string_value: "{kind}" }} }} '
    text += 'parameters { key: "normalize" value { string_value: "false" } }'
    result = instance_of(tmp_path, text).run(column("text", TEXTS), [])["embedding"].numpy()
    expected = [reference_embedding(model, tmp_path / "1", sentence, kind) for sentence in TEXTS]
    np.testing.assert_allclose(result, np.stack(expected), atol=1e-5)  # sums in another order


def test_pooling_and_length_are_those_that_sentence_transformers_wrote_down(tmp_path: Path) -> None:
    model = folders.write_bert(tmp_path / "1", "BertModel")
    folders.write_sentence_modules(tmp_path / "1", "pooling_mode_cls_token", normalizes=True)
    result = instance_of(tmp_path).run(column("text", TEXTS[:1]), [])["embedding"].numpy()[0]
    expected = reference_embedding(model, tmp_path / "1", TEXTS[0], "cls")
    np.testing.assert_allclose(result, expected / np.linalg.norm(expected), atol=1e-5)


def test_config_is_complete_without_one_being_written(tmp_path: Path) -> None:
    folders.write_bert(tmp_path / "1", "BertModel")
    config = context_of(tmp_path).config
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (32, True)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("text", 13, [1])]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [("embedding", 11, [32])]


def test_folder_that_is_the_model_itself_serves(tmp_path: Path) -> None:
    folders.write_bert(tmp_path, "BertModel")
    assert instance_of(tmp_path).run(column("text", ["a"]), [])["embedding"].shape == (1, 32)


def test_folder_named_in_the_config_serves(tmp_path: Path) -> None:
    folders.write_bert(tmp_path / "elsewhere", "BertModel")
    (tmp_path / "model" / "1").mkdir(parents=True)
    text = f'serving {{ llm {{ model: "{tmp_path / "elsewhere"}" }} }}'
    assert instance_of(tmp_path / "model", text).run(column("text", ["a"]), [])["embedding"].shape == (1, 32)


# --- classification ------------------------------------------------------------------------------------


def test_classes_and_scores_are_those_of_transformers_pipeline(tmp_path: Path) -> None:
    folders.write_bert(tmp_path / "1", "BertForSequenceClassification", **folders.labels("good", "bad", "neither"))
    results = instance_of(tmp_path).run(column("text", TEXTS), [])
    pipeline: Any = transformers.pipeline("text-classification", str(tmp_path / "1"), device="cpu")
    expected = pipeline(TEXTS, truncation=True, max_length=64)
    assert values(results, "label") == [row["label"] for row in expected]
    np.testing.assert_allclose(values(results, "score"), [row["score"] for row in expected], atol=1e-5)
    np.testing.assert_allclose(results["probabilities"].numpy().sum(1), 1, atol=1e-5)


def test_labels_that_do_not_exclude_each_other_have_probabilities_of_their_own(tmp_path: Path) -> None:
    settings = {**folders.labels("a", "b", "c"), "problem_type": "multi_label_classification"}
    model = folders.write_bert(tmp_path / "1", "BertForSequenceClassification", **settings)
    result = instance_of(tmp_path).run(column("text", TEXTS[:1]), ["probabilities"])
    assert list(result) == ["probabilities"]
    with torch.inference_mode():
        expected = model(**tokens_of(tmp_path / "1", TEXTS[0])).logits.sigmoid().numpy()
    np.testing.assert_allclose(result["probabilities"].numpy(), expected, atol=1e-5)


def test_pairs_of_texts_are_classified_together(tmp_path: Path) -> None:
    model = folders.write_bert(tmp_path / "1", "BertForSequenceClassification", **folders.labels("yes", "no", "maybe"))
    text = 'input { name: "text" } input { name: "text_pair" optional: true }'
    both = {**column("text", ["the cat", "a dog"]), **column("text_pair", ["sits", "lives in berlin"])}
    result = instance_of(tmp_path, text).run(both, [])["probabilities"].numpy()
    with torch.inference_mode():
        expected = model(**tokens_of(tmp_path / "1", "a dog", "lives in berlin")).logits.softmax(1).numpy()
    np.testing.assert_allclose(result[1:], expected, atol=1e-5)


def test_one_label_is_a_reranker_that_scores_query_and_text(tmp_path: Path) -> None:
    model = folders.write_bert(tmp_path / "1", "BertForSequenceClassification", **folders.labels("relevance"))
    inputs = {**column("query", ["how long is bread baked"] * 2), **column("text", ["the cat", "long"])}
    result = instance_of(tmp_path).run(inputs, [])["score"].numpy()
    with torch.inference_mode():
        expected = model(**tokens_of(tmp_path / "1", "how long is bread baked", "long")).logits.sigmoid()
    np.testing.assert_allclose(result[1], expected[0], atol=1e-5)


def test_entities_are_those_of_transformers_pipeline(tmp_path: Path) -> None:
    names = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    folders.write_bert(tmp_path / "1", "BertForTokenClassification", **folders.labels(*names))
    texts = ["anna lives in berlin", "the dogs", "", "Anna Anna  berlin!"]
    answers = [
        json.loads(answer) for answer in values(instance_of(tmp_path).run(column("text", texts), []), "entities")
    ]
    pipeline: Any = transformers.pipeline(
        "token-classification", str(tmp_path / "1"), aggregation_strategy="simple", device="cpu"
    )
    for text, entities in zip(texts, answers, strict=True):
        expected = pipeline(text) if text else []
        assert [(e["entity"], e["start"], e["end"]) for e in entities] == [
            (e["entity_group"], e["start"], e["end"]) for e in expected
        ]
        np.testing.assert_allclose([e["score"] for e in entities], [e["score"] for e in expected], atol=1e-5)
        assert all(entity["word"] == text[entity["start"] : entity["end"]] for entity in entities)


def image_bytes(color: str, size: tuple[int, int] = (50, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def test_images_come_as_files_of_any_size(tmp_path: Path) -> None:
    folders.write_vit(tmp_path / "1", "cat", "dog", "other")
    files = [image_bytes("red"), image_bytes("blue", (8, 9))]
    results = instance_of(tmp_path).run(column("image", files), [])
    pipeline: Any = transformers.pipeline("image-classification", str(tmp_path / "1"), device="cpu")
    for row, file in enumerate(files):
        best = pipeline(Image.open(io.BytesIO(file)))[0]
        assert values(results, "label")[row] == best["label"]
        np.testing.assert_allclose(values(results, "score")[row], best["score"], atol=1e-5)


def test_bytes_that_are_no_image_are_the_clients_error(tmp_path: Path) -> None:
    folders.write_vit(tmp_path / "1", "cat", "dog")
    with pytest.raises(InvalidArgument, match="element 1 of input 'image' is no image file"):
        instance_of(tmp_path).run(column("image", [image_bytes("red"), b"nonsense"]), [])


# --- folders that can't be served ----------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "1" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["BertForMaskedLM"]}, Unsupported, r"config\.json: .* no task for BertForMaskedLM"),
        ({"architectures": ["BertForTokenClassification"]}, InvalidArgument, "lack classifier.bias, classifier.weight"),
        ({"id2label": {"one": "a"}}, InvalidArgument, r"config\.json: id2label is no map"),
        ({"hidden_size": 31}, InvalidArgument, r"config\.json, model\.safetensors"),
    ],
)
def test_folder_that_does_not_fit_is_an_error_that_says_why(
    tmp_path: Path, changes: dict[str, Any], error: type[EnginehouseError], message: str
) -> None:
    folders.write_bert(tmp_path / "1", "BertModel")
    change_config(tmp_path, **changes)
    with pytest.raises(error, match=message):
        instance_of(tmp_path)


def test_missing_weights_are_named_and_pickled_ones_are_not_read(tmp_path: Path) -> None:
    folders.write_bert(tmp_path / "1", "BertModel")
    (tmp_path / "1" / "model.safetensors").rename(tmp_path / "1" / "pytorch_model.bin")
    with pytest.raises(NotFound, match=r"has no model\.safetensors"):
        instance_of(tmp_path)


def test_missing_tokenizer_is_an_error_that_says_where(tmp_path: Path) -> None:
    folders.write_bert(tmp_path / "1", "BertModel")
    for path in (tmp_path / "1").glob("token*"):
        path.unlink()
    with pytest.raises(NotFound, match=r"1 has no tokenizer: none of tokenizer\.json"):
        instance_of(tmp_path)


def test_unknown_task_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    folders.write_bert(tmp_path / "1", "BertModel")
    with pytest.raises(InvalidArgument, match="unknown task 'juggling'; known are embedding"):
        instance_of(tmp_path, 'serving { llm { task: "juggling" } }')
