"""Opens what an LLM's weights come from."""

from __future__ import annotations

import torch

from enginehouse_backends.llm.architecture import read_architecture
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.llm_settings import LlmSettings
from enginehouse_backends.llm.random_checkpoint import RandomCheckpoint


def open_checkpoint(settings: LlmSettings, device: torch.device | None = None) -> Checkpoint:
    """`device` is where random weights are made. Raises NotFound or InvalidArgument naming the file that is wrong."""
    if settings.load_format == "dummy":
        return RandomCheckpoint(settings.folder, read_architecture(settings.folder), device)
    return Checkpoint(settings.folder)
