"""Every example model, asked through the server by a tritonclient: real data in, right answers out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import transformers
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from sklearn.datasets import load_digits, load_iris
from sklearn.ensemble import RandomForestClassifier
from tritonclient.utils import InferenceServerException

from enginehouse.testing.server import ServerProcess
from tests.acceptance.conftest import EXAMPLES

SEED = 20240229  # of model_repository/recipes.py


@pytest.fixture
def client(examples: ServerProcess) -> Iterator[Any]:
    with http_client.InferenceServerClient(examples.http) as connected:
        yield connected


def infer(client: Any, model: str, arrays: dict[str, Any], **options: Any) -> Any:
    inputs = []
    for name, array in arrays.items():
        inputs.append(http_client.InferInput(name, list(array.shape), {"f": "FP32", "i": "INT64"}[array.dtype.kind]))
        inputs[-1].set_data_from_numpy(array)
    return client.infer(model, inputs, **options)


def digits() -> tuple[Any, Any]:
    """Images [n, 1, 8, 8] from 0 to 1, and what they show."""
    bunch = load_digits()
    return (bunch.images / 16.0).astype(np.float32)[:, None], bunch.target


def test_identity_and_add_sub(client: Any) -> None:
    left, right = np.arange(12, dtype=np.float32).reshape(3, 4), np.ones((3, 4), np.float32)
    assert (infer(client, "identity", {"INPUT0": left}).as_numpy("OUTPUT0") == left).all()
    both = infer(client, "add_sub", {"INPUT0": left, "INPUT1": right})
    assert (both.as_numpy("OUTPUT0") == left + right).all()
    assert (both.as_numpy("OUTPUT1") == left - right).all()
    with pytest.raises(InferenceServerException, match=r"INPUT0 has shape \[3, 4\], INPUT1 \[3, 2\]"):
        infer(client, "add_sub", {"INPUT0": left, "INPUT1": right[:, :2]})


@pytest.mark.parametrize(
    ("model", "image", "probabilities"),
    [("digits", "INPUT__0", "OUTPUT__0"), ("digits_export", "image", "probabilities")],
)
def test_digits_are_read(client: Any, model: str, image: str, probabilities: str) -> None:
    images, labels = digits()
    answers = [infer(client, model, {image: images[at : at + 64]}) for at in range(0, 640, 64)]
    guesses = np.concatenate([answer.as_numpy(probabilities) for answer in answers]).argmax(1)
    assert (guesses == labels[:640]).mean() > 0.97


@pytest.mark.parametrize("model", ["digits", "digits_export"])
def test_classification_names_digits_by_their_labels(client: Any, model: str) -> None:
    image, output = ("INPUT__0", "OUTPUT__0") if model == "digits" else ("image", "probabilities")
    images, labels = digits()
    names = (EXAMPLES / model / "labels.txt").read_text().split()
    classes = http_client.InferRequestedOutput(output, class_count=3)
    best = infer(client, model, {image: images[:8]}, outputs=[classes]).as_numpy(output)
    assert best.shape == (8, 3)
    assert [row[0].decode().split(":")[2] for row in best] == [names[label] for label in labels[:8]]


def test_iris_forest_answers_as_scikit_learn_does_without_any_config(client: Any) -> None:
    iris = load_iris()
    forest = RandomForestClassifier(n_estimators=50, max_depth=5, random_state=SEED)
    forest.fit(iris.data.astype(np.float32), iris.target)
    flowers = iris.data[::40].astype(np.float32)
    answer = infer(client, "iris_trees", {"features": flowers})
    assert answer.as_numpy("label").reshape(-1).tolist() == forest.predict(flowers).tolist()
    np.testing.assert_allclose(answer.as_numpy("probabilities"), forest.predict_proba(flowers), atol=1e-6)
    assert not list((EXAMPLES / "iris_trees").glob("config.*"))


def test_digits_stream_equals_its_stateless_reference_row_by_row(examples: ServerProcess, client: Any) -> None:
    """Three digits at once, their rows interleaved, each a sequence of its own."""
    images, labels = digits()
    chosen = images[[3, 8, 11], 0]
    whole = infer(client, "digits_rows", {"rows": chosen}).as_numpy("probabilities")
    with grpc_client.InferenceServerClient(examples.grpc) as stream:
        for row in range(8):
            for number in range(3):
                tensor = grpc_client.InferInput("row", [1, 8], "FP32")
                tensor.set_data_from_numpy(chosen[number, row : row + 1])
                answer = stream.infer(
                    "digits_stream", [tensor], sequence_id=100 + number, sequence_start=row == 0, sequence_end=row == 7
                )
                np.testing.assert_allclose(answer.as_numpy("probabilities")[0], whole[number, row], atol=1e-6)
    assert (whole[:, -1].argmax(1) == labels[[3, 8, 11]]).all()


def test_minilm_tells_its_inputs_and_outputs_from_the_file(client: Any) -> None:
    metadata = client.get_model_metadata("minilm")
    assert metadata["inputs"] == [
        {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "attention_mask", "datatype": "INT64", "shape": [-1, -1]},
    ]
    assert metadata["outputs"] == [{"name": "last_hidden_state", "datatype": "FP32", "shape": [-1, -1, 384]}]


def test_pydoc_chat_writes_what_transformers_would(examples: ServerProcess) -> None:
    folder = EXAMPLES / "pydoc_chat" / "1"
    auto: Any = transformers.AutoModelForCausalLM
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    messages: Any = [{"role": "user", "content": "Explain lambda"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = auto.from_pretrained(folder).generate(**prompt, max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(whole[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    with openai.OpenAI(base_url=f"http://{examples.http}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model="pydoc_chat", messages=messages, max_tokens=24, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == expected
    assert "statement" in expected
