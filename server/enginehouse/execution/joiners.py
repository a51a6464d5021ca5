"""The joiner of a config: the plain one with what the config says of ragged and padded tensors."""

from __future__ import annotations

from enginehouse.config.schema import ModelConfig
from enginehouse.execution.joining import Joiner
from enginehouse.execution.padding import PaddingPlan, add_padding_rules
from enginehouse.execution.ragged import add_ragged_rules


def joiner_of(config: ModelConfig) -> Joiner:
    """Raises InvalidArgument if the config's padding names what the model doesn't have."""
    joiner = Joiner.of_config(config)
    add_padding_rules(joiner, PaddingPlan.of(config))
    add_ragged_rules(joiner, config)
    return joiner
