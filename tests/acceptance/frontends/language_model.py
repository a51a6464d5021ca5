"""A small language model with random weights, a byte-level tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from tests.acceptance.llm.small_models import save_reference, save_tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def save_model(folder: Path) -> None:
    save_reference("llama", folder)
    save_tokenizer(folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
