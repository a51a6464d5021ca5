"""Which architectures the engine knows, by the name in config.json's `architectures`.

A family's file is imported when a checkpoint asks for it.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from enginehouse.errors import Unsupported
from enginehouse_backends.llm.attention import StepBatch
from enginehouse_backends.llm.layers import Build, Layer, Value

_MODULES = {
    "Gemma2ForCausalLM": ("gemma", "GemmaModel"),
    "Gemma3ForCausalLM": ("gemma", "GemmaModel"),
    "Gemma3ForConditionalGeneration": ("gemma", "GemmaModel"),
    "LlamaForCausalLM": ("llama", "LlamaModel"),
    "MistralForCausalLM": ("mistral", "MistralModel"),
    "MixtralForCausalLM": ("mixtral", "MixtralModel"),
    "Phi3ForCausalLM": ("phi3", "Phi3Model"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2Model"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3Model"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "Qwen3MoeModel"),
}


class DecoderModel(Layer):
    """A decoder: tokens of a step in, logits of the wanted rows out."""

    is_capturable = True
    """Whether `forward` only launches work, so that a GPU's graph can hold it."""

    def __init__(self, build: Build) -> None:
        self.build = build

    @abstractmethod
    def forward(self, tokens: Value, step: StepBatch | None) -> Value:
        """[T] tokens → [R, vocab] float32. Called with a Symbol and None to record a program."""


def known_architectures() -> list[str]:
    return sorted(_MODULES)


def build_model(build: Build) -> DecoderModel:
    """The model without weights; `model.load(checkpoint)` fills it.

    Raises Unsupported for an unknown family.
    """
    family = build.architecture.family
    if build.pooled and family.endswith("Model"):  # saved without its head
        family = f"{family.removesuffix('Model').removesuffix('Text')}ForCausalLM"
    if build.pooled and family not in _MODULES:
        raise Unsupported(
            f"architecture '{family}' can't embed in this engine; those that can are {', '.join(known_architectures())}"
        )
    if family not in _MODULES and not _transformers_knows(build.architecture.raw):
        raise Unsupported(f"architecture '{family}' is not supported; known are {', '.join(known_architectures())}")
    module, name = _MODULES.get(family, ("general", "GeneralModel"))
    made: DecoderModel = getattr(importlib.import_module(f"{__name__}.{module}"), name)(build)
    return made


def _transformers_knows(raw: Mapping[str, Any]) -> bool:
    """Whether transformers has a decoder of that architecture, which may then run over paged attention."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(raw.get("model_type")), ())
    names = (known,) if isinstance(known, str) else known
    return any(name in names for name in raw.get("architectures") or ())
