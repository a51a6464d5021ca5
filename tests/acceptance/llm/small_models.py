"""Small random checkpoints of each family, made by transformers, and what transformers says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

VOCAB = 256
MAX_POSITIONS = 256
SHAPE: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE: Mapping[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 6,
    "long_factor": [1.0, 1.3, 1.9, 2.5, 4.0, 7.0],
}  # fmt: skip
_UNEVEN: Mapping[str, Any] = {"hidden_size": 72, "intermediate_size": 104, "vocab_size": 264}
_EXPERTS: Mapping[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 5}


def _config(name: str, **settings: Any) -> Any:
    """For settings that the class takes and doesn't declare."""
    return getattr(transformers, name)(**settings)


CONFIGS: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=_LLAMA3),
    "llama-yarn": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=_YARN),
    "llama-biased": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=32),
    # widths that vectors, groups of them and the processor's tiles don't divide
    "qwen3-uneven": lambda: transformers.Qwen3Config(
        **{**SHAPE, **_UNEVEN, "intermediate_size": 112, "num_key_value_heads": 1},
        head_dim=96,
        tie_word_embeddings=True,
    ),
    "llama-uneven": lambda: transformers.LlamaConfig(**{**SHAPE, **_UNEVEN}, head_dim=48, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **SHAPE,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**SHAPE, "num_hidden_layers": 7}, head_dim=16, sliding_window=8, query_pre_attn_scalar=24
    ),
    "phi3": lambda: transformers.Phi3Config(**SHAPE, pad_token_id=0, sliding_window=8),
    # Phi-4-mini's partial rotation, and the long factors, as the test's 30 tokens exceed 20
    "phi4": lambda: _config(
        "Phi3Config",
        **SHAPE,
        pad_token_id=0,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=20,
        rope_scaling=_LONGROPE,
    ),
    # by the general path
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_head=4, n_layer=3, n_positions=MAX_POSITIONS
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE, pad_token_id=0),
    "cohere": lambda: transformers.CohereConfig(**SHAPE, pad_token_id=0),
    "granite": lambda: transformers.GraniteConfig(**SHAPE),
    "stablelm": lambda: transformers.StableLmConfig(**SHAPE),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, **_EXPERTS),
    "qwen3-moe": lambda: _config(
        "Qwen3MoeConfig",
        **SHAPE,
        **_EXPERTS,
        head_dim=32,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
}

NOT_NATIVE = ("mixtral", "qwen3-moe", "gpt2", "olmo2", "cohere", "granite", "stablelm")
"""What the CPU's native program has no operations for."""


QUANTIZABLE: Mapping[str, Any] = {**SHAPE, "hidden_size": 128, "intermediate_size": 192}
"""Widths that groups of 64 divide."""
QUANTIZED: Mapping[str, Callable[[], Any]] = {
    "quantizable": lambda: transformers.LlamaConfig(**QUANTIZABLE),
    "phi3-quantizable": lambda: transformers.Phi3Config(**QUANTIZABLE, pad_token_id=0),
    "qwen3-moe-quantizable": lambda: _config(
        "Qwen3MoeConfig", **QUANTIZABLE, **_EXPERTS, head_dim=32, moe_intermediate_size=64
    ),
}


def make_reference(config: Any, seed: int = 0) -> Any:
    """A model of transformers with random weights whose greedy choices are far from ties."""
    torch.manual_seed(seed)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
            else:
                parameter.mul_(3.0)
    return model


def save_reference(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Writes the checkpoint of CONFIGS[name] and gives the model back in float32."""
    model = make_reference({**CONFIGS, **QUANTIZED}[name]())
    model.to(dtype).save_pretrained(folder)
    return model.float()


def save_tokenizer(folder: Path) -> None:
    """Byte-level: token id b is byte b, so that any text and any broken character can be said."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    by_byte = {character: byte for byte, character in enumerate(_byte_order(alphabet))}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=by_byte, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))


def _byte_order(alphabet: list[str]) -> list[str]:
    """The alphabet's characters by the byte that each stands for."""
    decoder = tokenizers.decoders.ByteLevel()
    plain = [character for character in alphabet if ord(character) < 256]
    others = [character for character in alphabet if ord(character) >= 256]
    order = {ord(character): character for character in plain}
    rest = iter(others)
    for byte in range(256):
        if byte not in order:
            order[byte] = next(rest)
    assert decoder.decode([order[byte] for byte in b"a b"]) == "a b"
    return [order[byte] for byte in range(256)]
