"""A small model trained on real text (the sources of Python's standard library, byte by byte) within half a minute.

Random weights have no quality to lose; this one has learnt something that coarse weights would forget.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
import transformers

_LENGTH = 64
_STEPS = 500
_BATCH = 16


def read_text(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8: modules of the standard library in order of their names."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= num_bytes:
            break
    return torch.frombuffer(found[:num_bytes], dtype=torch.uint8)


def train(folder: Path) -> torch.Tensor:
    """Writes the checkpoint and gives held-out text [sequences, length]."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.06,
    )  # fmt: skip
    text = read_text(1_200_000).long()
    held_out, text = text[-80 * _LENGTH :].view(-1, _LENGTH), text[: -80 * _LENGTH]
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=_STEPS, pct_start=0.1)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the steps are small: a second thread only waits
    for _ in range(_STEPS):
        starts = torch.randint(0, len(text) - _LENGTH, (_BATCH,))
        batch = torch.stack([text[start : start + _LENGTH] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.set_num_threads(num_threads)
    model.eval().save_pretrained(folder)
    return held_out


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """logits: [sequences, length, vocab] of ids: [sequences, length]"""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().long())
    return float(losses.exp())
