"""What a Hugging Face folder is: its task, labels, longest text and pooling, read from its JSON files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from enginehouse.backend import LoadContext
from enginehouse.errors import InvalidArgument, NotFound, Unsupported

WEIGHT_PATTERN = "*.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
UNBOUNDED_LENGTH = 1 << 20
"""Tokenizers without a limit say 1e30."""
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
"""Model types whose first two positions are no text's."""


class Task(StrEnum):
    EMBEDDING = "embedding"
    TEXT_CLASSIFICATION = "text-classification"
    RERANKING = "reranking"
    TOKEN_CLASSIFICATION = "token-classification"
    IMAGE_CLASSIFICATION = "image-classification"


TASK_BY_HEAD = {
    "ForSequenceClassification": Task.TEXT_CLASSIFICATION,
    "ForTokenClassification": Task.TOKEN_CLASSIFICATION,
    "ForImageClassification": Task.IMAGE_CLASSIFICATION,
}
OTHER_NAMES = {
    "feature-extraction": Task.EMBEDDING,
    "sentence-similarity": Task.EMBEDDING,
    "embed": Task.EMBEDDING,
    "classify": Task.TEXT_CLASSIFICATION,
    "sentiment-analysis": Task.TEXT_CLASSIFICATION,
    "text-ranking": Task.RERANKING,
    "rerank": Task.RERANKING,
    "score": Task.RERANKING,
    "ner": Task.TOKEN_CLASSIFICATION,
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """How token vectors become one: "mean", "cls", "max" or "last"."""

    kind: str = "mean"
    normalizes: bool = True
    size: int = 0


@dataclass(frozen=True, slots=True)
class Folder:
    path: Path
    task: Task
    labels: tuple[str, ...]
    """In the order of the model's outputs."""
    max_length: int
    """Tokens, the special ones included."""
    pooling: Pooling
    is_multi_label: bool
    """Labels don't exclude each other: each has a probability of its own."""
    config: Mapping[str, Any]

    @property
    def weight_files(self) -> list[Path]:
        return sorted(self.path.glob(WEIGHT_PATTERN))


def find_folder(context: LoadContext) -> Path:
    """The folder with config.json: what `serving.llm.model` names, the version's, or the model's own.

    Raises NotFound that names where was looked.
    """
    named = context.config.serving.llm.model or context.parameter("model")
    roots = [context.version_directory, context.model_directory]
    candidates = [root / named for root in roots] if named else roots
    for path in candidates:
        if (path / "config.json").is_file():
            return path
    raise NotFound(
        f"model '{context.name}': no Hugging Face model's config.json in {' or '.join(map(str, candidates))}"
    )


def read_folder(context: LoadContext) -> Folder:
    """Raises an EnginehouseError that names the file, for a folder that no task here can serve."""
    path = find_folder(context)
    config = read_json(path / "config.json")
    if not list(path.glob(WEIGHT_PATTERN)):
        raise NotFound(
            f"{path} has no model.safetensors or other {WEIGHT_PATTERN}; weights in other formats are not read: "
            f"unpickling them runs code"
        )
    task = task_of(context, path, config)
    check_preprocessing(path, task)
    labels = labels_of(path, config)
    return Folder(
        path,
        task,
        labels,
        max_length_of(context, path, config),
        pooling_of(context, path, config),
        config.get("problem_type") == "multi_label_classification",
        config,
    )


def check_preprocessing(path: Path, task: Task) -> None:
    """Raises NotFound if what turns inputs into numbers isn't there: transformers would make an empty tokenizer."""
    wanted = ("preprocessor_config.json",) if task is Task.IMAGE_CLASSIFICATION else TOKENIZER_FILES
    if not any((path / name).is_file() for name in wanted):
        kind = "image processor" if task is Task.IMAGE_CLASSIFICATION else "tokenizer"
        raise NotFound(f"{path} has no {kind}: none of {', '.join(wanted)} is there")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InvalidArgument(f"can't read {path}: {problem}") from None
    if not isinstance(content, dict):
        raise InvalidArgument(f"{path} holds no JSON object")
    return content


def task_of(context: LoadContext, path: Path, config: Mapping[str, Any]) -> Task:
    """What the config asks for, else what the architecture's head is for."""
    asked = context.config.serving.llm.task or context.parameter("task")
    if asked:
        task = OTHER_NAMES.get(asked) or (Task(asked) if asked in set(Task) else None)
        if task is None:
            raise InvalidArgument(f"model '{context.name}': unknown task '{asked}'; known are {', '.join(Task)}")
        return task
    architectures: Sequence[str] = config.get("architectures") or [""]
    for head, task in TASK_BY_HEAD.items():
        if architectures[0].endswith(head):
            is_scorer = task is Task.TEXT_CLASSIFICATION and len(labels_of(path, config)) == 1
            return Task.RERANKING if is_scorer else task
    if architectures[0].endswith("Model") or (path / "modules.json").is_file() or not architectures[0]:
        return Task.EMBEDDING
    raise Unsupported(
        f"{path / 'config.json'}: the transformers backend has no task for {architectures[0]}; it serves "
        f"{', '.join(Task)} (name one in serving.llm.task)"
    )


def labels_of(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("id2label")
    if named is None:  # transformers writes LABEL_0 and LABEL_1 for two labels without names
        return tuple(f"LABEL_{number}" for number in range(int(config.get("num_labels", 2))))
    try:
        return tuple(str(named[key]) for key in sorted(named, key=int))
    except (TypeError, ValueError, AttributeError) as problem:
        raise InvalidArgument(f"{path / 'config.json'}: id2label is no map of numbers to labels: {problem}") from None


def max_length_of(context: LoadContext, path: Path, config: Mapping[str, Any]) -> int:
    """The least of what the config, the tokenizer and the position table allow."""
    limits = [int(config.get("max_position_embeddings") or UNBOUNDED_LENGTH)]
    if config.get("model_type") in OFFSET_POSITIONS:
        limits[0] -= 2
    if (path / "tokenizer_config.json").is_file():
        said = read_json(path / "tokenizer_config.json").get("model_max_length")
        limits.append(int(min(said, UNBOUNDED_LENGTH)) if said else UNBOUNDED_LENGTH)
    limits.append(context.config.serving.llm.max_model_len or UNBOUNDED_LENGTH)
    return min(limits)


def pooling_of(context: LoadContext, path: Path, config: Mapping[str, Any]) -> Pooling:
    """As sentence-transformers wrote it down; mean and length 1 where nobody did."""
    size = int(config.get("hidden_size") or config.get("dim") or 0)
    kind, normalizes = "mean", True
    if (path / "modules.json").is_file():
        modules = json.loads((path / "modules.json").read_text())
        types = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
        normalizes = "Normalize" in types
        unknown = set(types) - {"Transformer", "Pooling", "Normalize"}
        if unknown:
            raise Unsupported(f"{path / 'modules.json'} has modules that are not served: {', '.join(sorted(unknown))}")
        folders = [
            str(module.get("path", "")) for module, name in zip(modules, types, strict=True) if name == "Pooling"
        ]
        if folders:
            kind = pooling_kind(path / folders[0] / "config.json")
    kind = context.parameter("pooling") or kind
    if kind not in POOLING_KINDS:
        raise InvalidArgument(f"model '{context.name}': unknown pooling '{kind}'; known are {', '.join(POOLING_KINDS)}")
    asked = context.parameter("normalize").lower()
    return Pooling(kind, asked in ("1", "true") if asked else normalizes, size)


POOLING_KINDS = ("mean", "cls", "max", "last")
_KIND_BY_SWITCH = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


def pooling_kind(path: Path) -> str:
    config = read_json(path)
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if len(on) != 1 or on[0] not in _KIND_BY_SWITCH:
        known = ", ".join(_KIND_BY_SWITCH)
        raise Unsupported(f"{path} switches on {', '.join(on) or 'nothing'}; exactly one of {known} is served")
    return _KIND_BY_SWITCH[on[0]]
