"""How one LLM is to be served: from the config's `serving.llm`, Triton's model.json, or nothing at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enginehouse.backend import LoadContext
from enginehouse.errors import InvalidArgument, NotFound
from enginehouse_backends.llm.pooling import PoolingSettings, read_pooling

logger = logging.getLogger(__name__)

DEFAULT_GROUP = "llm"
_FROM_MODEL_JSON: Mapping[str, str] = {
    "model": "model", "tokenizer": "tokenizer", "revision": "revision", "dtype": "dtype",
    "quantization": "quantization", "kv_cache_dtype": "kv_cache_dtype", "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs", "max_num_batched_tokens": "max_num_batched_tokens", "block_size": "block_size",
    "enable_prefix_caching": "enable_prefix_caching", "tensor_parallel_size": "tensor_parallel_size",
    "load_format": "load_format", "gpu_memory_utilization": "gpu_memory_utilization",
    "chat_template": "chat_template",
    "served_model_name": "served_model_name",
}  # fmt: skip
"""vLLM's engine arguments, as Triton's vLLM backend keeps them, by our name."""
ATTENTIONS = ("triton", "flashinfer", "fa3")
_DTYPES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True, slots=True)
class LlmSettings:
    """0, "" and None leave the choice to the engine."""

    folder: Path
    """Local, with config.json and weights."""
    tokenizer_folder: Path
    dtype: str = ""
    quantization: str = ""
    kv_cache_dtype: str = ""
    max_model_len: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    block_size: int = 0
    target_itl_ms: float = 0.0
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    chat_template: str = ""
    engine_group: str = DEFAULT_GROUP
    kv_bytes: int = 0
    num_threads: int = 0
    max_waiting: int = 0
    pooling: PoolingSettings = field(default_factory=PoolingSettings)
    """Whether it embeds, and how."""
    load_format: str = ""
    """dummy makes random weights, for measuring; config.json alone is needed then."""
    gpu_memory_utilization: float = 0.0
    attention: str = ""
    """Of a GPU: triton, flashinfer or fa3; "" measures."""
    share_weight: float = 1.0
    """Of the arena's pages, against the other LLMs of the engine."""


def read_settings(context: LoadContext) -> LlmSettings:
    """Raises NotFound or InvalidArgument naming the file or field that is wrong."""
    given = _config_fields(context)
    for key, value in _model_json_fields(context).items():
        given.setdefault(key, value)
    folder = _find_folder(context, str(given.get("model", "")), str(given.get("revision", "")))
    tokenizer = str(given.get("tokenizer", ""))
    dtype = str(given.get("dtype", ""))
    return LlmSettings(
        folder=folder,
        tokenizer_folder=_find_folder(context, tokenizer, "") if tokenizer else folder,
        dtype="" if dtype == "auto" else _DTYPES.get(dtype, dtype),
        quantization=str(given.get("quantization") or ""),
        kv_cache_dtype=str(given.get("kv_cache_dtype") or ""),
        max_model_len=_count(given, "max_model_len"),
        max_num_seqs=_count(given, "max_num_seqs"),
        max_num_batched_tokens=_count(given, "max_num_batched_tokens"),
        block_size=_count(given, "block_size"),
        target_itl_ms=float(given.get("target_itl_ms", 0.0)),
        enable_prefix_caching=bool(given.get("enable_prefix_caching", True)),
        tensor_parallel_size=_count(given, "tensor_parallel_size") or 1,
        chat_template=str(given.get("chat_template", "")),
        engine_group=str(given.get("engine_group", "")) or DEFAULT_GROUP,
        kv_bytes=int(context.config.serving.memory.kv_bytes),
        num_threads=_count_parameter(context, "num_threads"),
        max_waiting=_count_parameter(context, "max_waiting"),
        pooling=read_pooling(folder, str(given.get("task") or "")),
        load_format=_load_format(context, given),
        gpu_memory_utilization=_fraction(context, given, "gpu_memory_utilization"),
        attention=_attention(context),
        share_weight=float(context.parameter("share_weight", "1") or 1),
    )


def _config_fields(context: LoadContext) -> dict[str, Any]:
    llm = context.config.serving.llm
    return {field.name: value for field, value in llm.ListFields()}


def _model_json_fields(context: LoadContext) -> dict[str, Any]:
    path = context.version_directory / "model.json"
    if not path.is_file():
        return {}
    try:
        given = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidArgument(f"{path} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise InvalidArgument(f"{path} must hold a JSON object")
    if "model" not in given:
        raise InvalidArgument(f"{path} must name the 'model'")
    unknown = sorted(set(given) - set(_FROM_MODEL_JSON))
    if unknown:
        logger.info("%s: these engine arguments have no meaning here: %s", path, ", ".join(unknown))
    return {ours: given[theirs] for theirs, ours in _FROM_MODEL_JSON.items() if given.get(theirs) is not None}


def _find_folder(context: LoadContext, model: str, revision: str) -> Path:
    """The version's folder, the model's own, a path (relative to either), or a Hugging Face id."""
    places = [context.version_directory, context.model_directory]
    if model:
        places = [place / model for place in places] if not Path(model).is_absolute() else [Path(model)]
    for place in places:
        if (place / "config.json").is_file():
            return place
    if model and model.count("/") == 1 and not model.startswith((".", "/")):
        return _fetch(model, revision)
    raise NotFound(
        f"model '{context.name}': no Hugging Face folder (with a config.json) at {' or '.join(map(str, places))}"
    )


def _fetch(model: str, revision: str) -> Path:
    """A Hugging Face id: from the local cache, else downloaded."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise NotFound(f"'{model}' is no local folder; fetching it needs `pip install enginehouse[hf]`") from error
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision or None))
    except Exception as error:  # the library's errors have no common base with a usable text
        raise NotFound(f"'{model}' is neither a local folder nor to be had from Hugging Face: {error}") from error


def _count(given: Mapping[str, Any], key: str) -> int:
    value = given.get(key) or 0
    if not isinstance(value, int) or value < 0:
        raise InvalidArgument(f"'{key}' must be a whole number, found {value!r}")
    return value


def _count_parameter(context: LoadContext, key: str) -> int:
    text = context.parameter(key) or context.backend_options.get(key, "")
    if text and not text.isdigit():
        raise InvalidArgument(f"parameter '{key}' must be a whole number, found '{text}'")
    return int(text or 0)


def _load_format(context: LoadContext, given: Mapping[str, Any]) -> str:
    name = context.parameter("load_format") or str(given.get("load_format") or "")
    if name not in ("", "auto", "safetensors", "dummy"):
        raise InvalidArgument(f"load_format '{name}' is none of auto, safetensors, dummy")
    return name if name == "dummy" else ""


def _fraction(context: LoadContext, given: Mapping[str, Any], key: str) -> float:
    text = context.parameter(key) or context.backend_options.get(key, "") or given.get(key) or 0.0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise InvalidArgument(f"'{key}' must be between 0 and 1, found {text!r}")
    return value


def _attention(context: LoadContext) -> str:
    name = context.parameter("attention") or context.backend_options.get("attention", "")
    if name not in ("", "auto", *ATTENTIONS):
        raise InvalidArgument(f"parameter 'attention' is none of {', '.join(ATTENTIONS)}, auto: '{name}'")
    return "" if name == "auto" else name
