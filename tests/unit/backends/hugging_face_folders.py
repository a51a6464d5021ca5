"""Small Hugging Face folders with random weights, written as `save_pretrained` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SENTENCE = "the a cat dog sits on mat how long is bread baked in berlin anna lives word ##s ##ing"
WORDS = SENTENCE.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]


def write_tokenizer(folder: Path, max_length: int = 64) -> None:
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*SPECIAL, *WORDS, *LETTERS]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer_class: Any = transformers.PreTrainedTokenizerFast
    tokenizer_class(
        tokenizer_object=tokenizer, model_max_length=max_length, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def bert_config(**settings: Any) -> Any:
    small = {
        "vocab_size": len(SPECIAL) + len(WORDS) + len(LETTERS), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.4,
    }  # fmt: skip
    return transformers.BertConfig(**{**small, **settings})


def write_bert(folder: Path, class_name: str, **settings: Any) -> Any:
    """The model that was saved."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    model = getattr(transformers, class_name)(bert_config(**settings)).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def labels(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def write_sentence_modules(folder: Path, switch: str, normalizes: bool) -> None:
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalizes else [])]
    entries = [
        {"idx": number, "name": str(number), "path": f"{number}_{name}", "type": f"sentence_transformers.models.{name}"}
        for number, name in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, switch: True}))


def write_vit(folder: Path, *names: str) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        initializer_range=0.4, **labels(*names),
    )  # fmt: skip
    model: Any = transformers.ViTForImageClassification(config)
    model.eval()
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model
