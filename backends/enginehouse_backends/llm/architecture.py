"""What a checkpoint's config.json says of a decoder, checked and in one shape for every family.

Reads both spellings of rotary settings: `rope_theta` with `rope_scaling`, and transformers 5's
`rope_parameters`. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enginehouse.errors import InvalidArgument, NotFound


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """Rotary embedding. `settings` holds the numbers of its kind (factor, low_freq_factor, …)."""

    theta: float = 10_000.0
    kind: str = "default"
    rotary_dim: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder's shape. `raw` is config.json itself, for what only one family knows."""

    family: str
    """The checkpoint's `architectures[0]`: LlamaForCausalLM, …"""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    activation: str
    tied_embeddings: bool
    rope: RopeSettings
    local_rope: RopeSettings | None
    """What layers with a sliding window use instead, where the family tells them apart (Gemma 3)."""
    sliding_windows: tuple[int, ...]
    """One a layer; 0 attends to everything."""
    dtype: str
    """As the checkpoint was saved: float32, bfloat16, float16."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    raw: Mapping[str, Any]
    text: Mapping[str, Any]
    """The part of `raw` that describes the decoder, with what the family leaves out filled in."""

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def read_architecture(folder: Path) -> Architecture:
    """Raises NotFound without a config.json, InvalidArgument for one that doesn't describe a decoder."""
    raw = _read_json(folder / "config.json", required=True)
    generation = _read_json(folder / "generation_config.json", required=False)
    return parse_architecture(raw, generation, str(folder / "config.json"))


def parse_architecture(raw: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> Architecture:
    names = raw.get("architectures") or [""]
    text: Mapping[str, Any] = raw.get("text_config") or raw
    text = {**_OMITTED.get(str(text.get("model_type")), {}), **_renamed(text), **text}
    number = _NumberReader(text, where)
    num_heads = number.required("num_attention_heads")
    hidden_size = number.required("hidden_size")
    head_dim = number.optional("head_dim", hidden_size // num_heads)
    num_layers = number.required("num_hidden_layers")
    num_kv_heads = number.optional("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise InvalidArgument(
            f"{where}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    max_positions = number.optional("max_position_embeddings", 2048)
    return Architecture(
        family=str(names[0]),
        hidden_size=hidden_size,
        intermediate_size=number.optional("intermediate_size", 4 * hidden_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=number.required("vocab_size"),
        max_positions=max_positions,
        norm_epsilon=float(text.get("rms_norm_eps", 1e-6)),
        activation=str(text.get("hidden_activation") or text.get("hidden_act") or "silu"),
        tied_embeddings=bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        rope=_rope_settings(text, head_dim, max_positions),
        local_rope=_local_rope_settings(text, head_dim),
        sliding_windows=_sliding_windows(text, num_layers),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or "float32"),
        eos_token_ids=_token_ids(generation.get("eos_token_id", text.get("eos_token_id"))),
        bos_token_id=generation.get("bos_token_id", text.get("bos_token_id")),
        raw=raw,
        text=text,
    )


def _renamed(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """GPT-2's names for what everyone else calls otherwise."""
    return {name: text[old] for old, name in _OLD_NAMES.items() if text.get(old) is not None}


_OLD_NAMES = {
    "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings", "n_inner": "intermediate_size",
}  # fmt: skip

_OMITTED: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {"tie_word_embeddings": True, "sliding_window_pattern": 2, "query_pre_attn_scalar": 256},
    "gemma3_text": {
        "tie_word_embeddings": True, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208,
        "max_position_embeddings": 131_072, "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
    },
}  # fmt: skip
"""What config.json leaves out when it equals the family's default in transformers."""


class _NumberReader:
    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw, self._where = raw, where

    def required(self, key: str) -> int:
        if self._raw.get(key) is None:
            raise InvalidArgument(f"{self._where}: '{key}' is missing, so this is no decoder's config")
        return self.optional(key, 0)

    def optional(self, key: str, default: int) -> int:
        value = self._raw.get(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise InvalidArgument(f"{self._where}: '{key}' must be a positive integer, found {value!r}")
        return value


def _read_json(path: Path, required: bool) -> Mapping[str, Any]:
    if not path.is_file():
        if required:
            raise NotFound(f"{path} is missing: not a Hugging Face model folder")
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidArgument(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path} must hold a JSON object")
    return value


def _rope_settings(text: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeSettings:
    scaling: dict[str, Any] = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    scaling = dict(scaling.get("full_attention", scaling))
    kind = str(scaling.pop("rope_type", scaling.pop("type", "default")) or "default")
    theta = float(scaling.pop("rope_theta", None) or text.get("rope_theta") or 10_000.0)
    partial = float(scaling.pop("partial_rotary_factor", None) or text.get("partial_rotary_factor") or 1.0)
    scaling.setdefault("max_position_embeddings", max_positions)
    if text.get("original_max_position_embeddings"):
        scaling["original_max_position_embeddings"] = text["original_max_position_embeddings"]
    return RopeSettings(theta, kind, int(head_dim * partial), scaling)


def _local_rope_settings(text: Mapping[str, Any], head_dim: int) -> RopeSettings | None:
    local: Mapping[str, Any] | None = (text.get("rope_parameters") or {}).get("sliding_attention")
    theta = (local or {}).get("rope_theta") or text.get("rope_local_base_freq")
    return RopeSettings(float(theta), "default", head_dim) if theta else None


def _sliding_windows(text: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    window = text.get("sliding_window")
    if not window or text.get("use_sliding_window") is False:
        return (0,) * num_layers
    kinds: Sequence[str] | None = text.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if text.get("sliding_window_pattern"):
        # Gemma before layer_types: every so many-th layer attends to everything
        every = int(text["sliding_window_pattern"])
        return tuple(window if (index + 1) % every else 0 for index in range(num_layers))
    if "max_window_layers" in text and "use_sliding_window" in text:
        # Qwen2: the layers from max_window_layers on slide
        return tuple(window if index >= text["max_window_layers"] else 0 for index in range(num_layers))
    return (window,) * num_layers


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
