"""Whether an output of one model may stay in its process for another model there. Pure."""

from __future__ import annotations

from enginehouse.config.schema import ModelConfig
from enginehouse.execution.contract import HostedModel
from enginehouse.types import DataType


def may_hand_over(giver: HostedModel | None, output: str, taker: HostedModel | None, input_name: str) -> bool:
    """Only where nobody in the server would have to read it: no cache, no padding, no ragged or string tensors, no
    sequences, no shape tensors."""
    if giver is None or taker is None or not giver.shared_processes & taker.shared_processes:
        return False
    is_plain = output not in giver.joiner.output_rules and not taker.joiner.derived_inputs
    if not is_plain or input_name in taker.joiner.input_rules:
        return False
    if _reads_tensors(giver.config) or _reads_tensors(taker.config):
        return False
    types = {each.name: each.data_type for each in giver.config.output}
    return types.get(output, DataType.BYTES.proto) != DataType.BYTES.proto


def _reads_tensors(config: ModelConfig) -> bool:
    """Whether the server looks into a model's tensors."""
    if config.response_cache.enable or config.HasField("sequence_batching"):
        return True
    return any(each.is_shape_tensor for each in config.input) or any(each.is_shape_tensor for each in config.output)
