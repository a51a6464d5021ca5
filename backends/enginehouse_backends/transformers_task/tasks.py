"""What each task takes and gives, and how a model's raw results become that.

embedding             text → embedding [hidden]
text-classification   text (and text_pair) → probabilities [labels], label, score
reranking             query, text → score
token-classification  text → entities: JSON, [{"entity", "score", "word", "start", "end"}]
image-classification  image: the bytes of an image file → probabilities [labels], label, score
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from enginehouse.errors import InvalidArgument
from enginehouse.types import Array, DataType, Tensor, TensorSpec
from enginehouse_backends.transformers_task.bucketing import group_by_length
from enginehouse_backends.transformers_task.folder import Folder, Pooling, Task

Results = dict[str, Any]
"""By output, an array with a row for each request's row."""


def spec(name: str, datatype: DataType, size: int = 1, optional: bool = False) -> TensorSpec:
    return TensorSpec(name, datatype, (-1, size), optional)


class TaskRunner(ABC):
    """One instance's tokenizer or image processor, with the model that instances share."""

    model_class: str
    inputs: tuple[TensorSpec, ...] = (spec("text", DataType.BYTES),)

    def __init__(self, folder: Folder, model: Any, device: str) -> None:
        self.folder = folder
        self.model = model
        self.device = device
        self.prepare()

    @classmethod
    @abstractmethod
    def outputs(cls, folder: Folder) -> tuple[TensorSpec, ...]: ...

    @abstractmethod
    def prepare(self) -> None:
        """Loads what turns inputs into tensors."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor]) -> Results: ...


class TextTask(TaskRunner):
    """Texts tokenized in one call, run in groups of like length, results put back into their order."""

    def prepare(self) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder.path, local_files_only=True)

    def texts(self, inputs: Mapping[str, Tensor]) -> tuple[list[str], list[str] | None]:
        """The texts, and the second ones of pairs."""
        pair = inputs.get("text_pair")
        return texts_of(inputs["text"]), texts_of(pair) if pair is not None else None

    def run(self, inputs: Mapping[str, Tensor]) -> Results:
        firsts, seconds = self.texts(inputs)
        if not firsts:
            return {output.name: empty_rows(output) for output in self.outputs(self.folder)}
        encoded = self.tokenizer(
            firsts, seconds, truncation=True, max_length=self.folder.max_length, **self.tokenizer_options()
        )
        rows: list[Results] = [{} for _ in firsts]
        for group in group_by_length([len(ids) for ids in encoded["input_ids"]]):
            picked = {key: [values[index] for index in group] for key, values in encoded.items()}
            for index, row in zip(group, self.run_group(picked), strict=True):
                rows[index] = row
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def tokenizer_options(self) -> dict[str, Any]:
        return {}

    def run_group(self, encoded: Mapping[str, Any]) -> list[Results]:
        """One row of results for each text of a group that is padded to its longest."""
        known = {key: encoded[key] for key in self.tokenizer.model_input_names if key in encoded}
        padded = self.tokenizer.pad(known, return_tensors="pt").to(self.device)
        return self.finish(self.model(**padded), padded, encoded)

    @abstractmethod
    def finish(self, output: Any, padded: Mapping[str, Any], encoded: Mapping[str, Any]) -> list[Results]: ...


class EmbeddingTask(TextTask):
    model_class = "AutoModel"

    @classmethod
    def outputs(cls, folder: Folder) -> tuple[TensorSpec, ...]:
        return (spec("embedding", DataType.FP32, folder.pooling.size),)

    def finish(self, output: Any, padded: Mapping[str, Any], encoded: Mapping[str, Any]) -> list[Results]:
        pooled = pool(output.last_hidden_state, padded["attention_mask"], self.folder.pooling)
        return [{"embedding": row} for row in pooled.float().cpu().numpy()]


def pool(hidden: Any, mask: Any, pooling: Pooling) -> Any:
    """hidden [batch, length, size], mask [batch, length] → [batch, size]."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling.kind == "mean":
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    elif pooling.kind == "max":
        pooled = hidden.masked_fill(weights == 0, -torch.inf).amax(1)
    else:
        # padding may be on either side
        positions = mask.argmax(1) if pooling.kind == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), positions]
    return torch.nn.functional.normalize(pooled, dim=1) if pooling.normalizes else pooled


class TextClassificationTask(TextTask):
    model_class = "AutoModelForSequenceClassification"
    inputs = (spec("text", DataType.BYTES), spec("text_pair", DataType.BYTES, optional=True))

    @classmethod
    def outputs(cls, folder: Folder) -> tuple[TensorSpec, ...]:
        return classification_outputs(folder)

    def finish(self, output: Any, padded: Mapping[str, Any], encoded: Mapping[str, Any]) -> list[Results]:
        return classify(output.logits, self.folder)


class RerankingTask(TextTask):
    """A cross-encoder: how well the text answers the query, 0 to 1."""

    model_class = "AutoModelForSequenceClassification"
    inputs = (spec("query", DataType.BYTES), spec("text", DataType.BYTES))

    @classmethod
    def outputs(cls, folder: Folder) -> tuple[TensorSpec, ...]:
        return (spec("score", DataType.FP32),)

    def texts(self, inputs: Mapping[str, Tensor]) -> tuple[list[str], list[str] | None]:
        return texts_of(inputs["query"]), texts_of(inputs["text"])

    def finish(self, output: Any, padded: Mapping[str, Any], encoded: Mapping[str, Any]) -> list[Results]:
        logits = output.logits.float()
        # of several labels the last says "relevant", as in models fine-tuned from classifiers
        scores = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)[:, -1:]
        return [{"score": row} for row in scores.cpu().numpy()]


class TokenClassificationTask(TextTask):
    model_class = "AutoModelForTokenClassification"

    @classmethod
    def outputs(cls, folder: Folder) -> tuple[TensorSpec, ...]:
        return (spec("entities", DataType.BYTES),)

    def texts(self, inputs: Mapping[str, Tensor]) -> tuple[list[str], list[str] | None]:
        self._texts = texts_of(inputs["text"])
        return self._texts, None

    def run(self, inputs: Mapping[str, Tensor]) -> Results:
        results = super().run(inputs)
        entities = [
            json.dumps(words_of(found, text), ensure_ascii=False)
            for found, text in zip(results.get("entities", ()), self._texts, strict=True)
        ]
        return {"entities": np.array(entities, dtype=object).reshape(-1, 1)}

    def tokenizer_options(self) -> dict[str, Any]:
        return {"return_offsets_mapping": True, "return_special_tokens_mask": True}

    def finish(self, output: Any, padded: Mapping[str, Any], encoded: Mapping[str, Any]) -> list[Results]:
        probabilities = output.logits.float().softmax(-1).cpu().numpy()
        pads_left = self.tokenizer.padding_side == "left"
        rows = []
        for row, (offsets, special) in enumerate(
            zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
        ):
            start = probabilities.shape[1] - len(offsets) if pads_left else 0
            own = probabilities[row, start : start + len(offsets)]
            holder = np.empty((), dtype=object)
            holder[()] = spans(own, offsets, special, self.folder.labels)
            rows.append({"entities": holder})
        return rows


def spans(probabilities: Array, offsets: Sequence[Any], special: Sequence[int], labels: Sequence[str]) -> list[Results]:
    """Entities of one text. Neighbouring tokens of one label are one, and B- begins another."""
    found: list[Results] = []
    scores: list[list[float]] = []
    last_end_token = -2
    for token, (row, (start, end), is_special) in enumerate(zip(probabilities, offsets, special, strict=True)):
        best = int(row.argmax())
        label = labels[best]
        if is_special or label == "O" or start == end:
            continue
        prefix, name = (label[0], label[2:]) if label[:2] in ("B-", "I-") else ("I", label)
        continues = found and last_end_token == token - 1 and found[-1]["entity"] == name and prefix != "B"
        if continues:
            found[-1]["end"] = int(end)
            scores[-1].append(float(row[best]))
        else:
            found.append({"entity": name, "start": int(start), "end": int(end)})
            scores.append([float(row[best])])
        last_end_token = token
    return [{**entity, "score": sum(own) / len(own)} for entity, own in zip(found, scores, strict=True)]


def words_of(entities: Sequence[Results], text: str) -> list[Results]:
    return [
        {
            "entity": entity["entity"],
            "score": round(entity["score"], 6),
            "word": text[entity["start"] : entity["end"]],
            "start": entity["start"],
            "end": entity["end"],
        }
        for entity in entities
    ]


class ImageClassificationTask(TaskRunner):
    model_class = "AutoModelForImageClassification"
    inputs = (spec("image", DataType.BYTES),)

    @classmethod
    def outputs(cls, folder: Folder) -> tuple[TensorSpec, ...]:
        return classification_outputs(folder)

    def prepare(self) -> None:
        loader: Any = transformers.AutoImageProcessor
        self.processor = loader.from_pretrained(self.folder.path, local_files_only=True, backend="pil")

    def run(self, inputs: Mapping[str, Tensor]) -> Results:
        images = [image_of(data, index) for index, data in enumerate(elements_of(inputs["image"]))]
        if not images:
            return {output.name: empty_rows(output) for output in self.outputs(self.folder)}
        pixels = self.processor(images, return_tensors="pt").to(self.device, self.model.dtype)
        rows = classify(self.model(**pixels).logits, self.folder)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def image_of(data: bytes, index: int) -> Any:
    """Raises InvalidArgument for bytes that are no image."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError) as problem:
        raise InvalidArgument(f"element {index} of input 'image' is no image file: {problem}") from None


def classification_outputs(folder: Folder) -> tuple[TensorSpec, ...]:
    return (
        spec("probabilities", DataType.FP32, len(folder.labels)),
        spec("label", DataType.BYTES),
        spec("score", DataType.FP32),
    )


def classify(logits: Any, folder: Folder) -> list[Results]:
    """Softmax, or a sigmoid each where labels don't exclude each other."""
    alone = folder.is_multi_label or len(folder.labels) == 1
    probabilities = (logits.float().sigmoid() if alone else logits.float().softmax(1)).cpu().numpy()
    rows = []
    for row in probabilities:
        best = int(row.argmax())
        rows.append(
            {"probabilities": row, "label": np.array([folder.labels[best]], dtype=object), "score": row[[best]]}
        )
    return rows


def empty_rows(output: TensorSpec) -> Array:
    return np.zeros((0, *output.dims[1:]), dtype=output.datatype.numpy)


def elements_of(tensor: Tensor) -> list[bytes]:
    """Raises InvalidArgument if there isn't one a row."""
    if len(tensor.shape) != 2 or tensor.shape[1] != 1:
        raise InvalidArgument(f"input '{tensor.name}' has shape {list(tensor.shape)}, it must be [rows, 1]")
    elements: list[bytes] = tensor.numpy().reshape(-1).tolist()
    return elements


def texts_of(tensor: Tensor) -> list[str]:
    """Raises InvalidArgument for an element that is not UTF-8."""
    texts = []
    for index, element in enumerate(elements_of(tensor)):
        try:
            texts.append(element.decode())
        except UnicodeDecodeError as problem:
            raise InvalidArgument(f"element {index} of input '{tensor.name}' is not UTF-8: {problem}") from None
    return texts


RUNNER_BY_TASK: dict[Task, type[TaskRunner]] = {
    Task.EMBEDDING: EmbeddingTask,
    Task.TEXT_CLASSIFICATION: TextClassificationTask,
    Task.RERANKING: RerankingTask,
    Task.TOKEN_CLASSIFICATION: TokenClassificationTask,
    Task.IMAGE_CLASSIFICATION: ImageClassificationTask,
}
