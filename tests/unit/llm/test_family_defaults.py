"""What config.json may leave out, and rotary tables against transformers' own formulas."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from enginehouse_backends.llm.architecture import Architecture, RopeSettings, parse_architecture  # noqa: E402
from enginehouse_backends.llm.rope import rope_table  # noqa: E402


def _parse(raw: dict[str, Any]) -> Architecture:
    return parse_architecture(raw, {}, "config.json")


def test_gemma_3_inside_a_multimodal_config_gets_what_its_text_part_leaves_out() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 7, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    found = _parse({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (8, 4, 256)
    assert found.tied_embeddings
    assert found.sliding_windows == (1024, 1024, 1024, 1024, 1024, 0, 1024)
    assert (found.rope.kind, found.rope.theta) == ("linear", 1_000_000.0)
    assert found.local_rope == RopeSettings(10_000.0, "default", 256)


def test_gemma_2_slides_in_every_other_layer() -> None:
    raw = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 64,
           "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 8, "sliding_window": 16}  # fmt: skip
    assert _parse(raw).sliding_windows == (16, 0, 16, 0)


@pytest.mark.parametrize("max_positions", [20, 80])
def test_longrope_uses_the_long_factors_beyond_the_trained_context(max_positions: int) -> None:
    from transformers import Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3],
               "long_factor": [1.0, 2.0, 4.0, 8.0]}  # fmt: skip
    make: Any = Phi3Config
    config = make(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
        max_position_embeddings=80, original_max_position_embeddings=20, rope_scaling=scaling,
    )  # fmt: skip
    settings = _parse({**config.to_dict(), "architectures": ["Phi3ForCausalLM"]}).rope
    frequencies, magnitude = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=max_positions)
    angles = torch.arange(max_positions)[:, None] * frequencies
    expected = torch.cat((angles.cos(), angles.sin()), 1) * magnitude
    torch.testing.assert_close(rope_table(settings, max_positions), expected, rtol=1e-5, atol=1e-5)
