"""The tensors that a config declares, as TensorSpecs: what clients send and what the model sees.

`request_*` is the protocol's view (metadata, checks of requests): declared dims, the batch axis in front.
`model_*` is the backend's view: after `reshape`, the batch axis in front.
"""

from __future__ import annotations

from collections.abc import Iterable

from enginehouse.config.schema import ModelConfig, ModelInput, ModelOutput
from enginehouse.types import DataType, TensorSpec


def request_inputs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    return tuple(_specs(config, config.input, reshaped=False))


def request_outputs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    return tuple(_specs(config, config.output, reshaped=False))


def model_inputs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    return tuple(_specs(config, config.input, reshaped=True))


def model_outputs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    return tuple(_specs(config, config.output, reshaped=True))


def has_batch_axis(config: ModelConfig) -> bool:
    return config.max_batch_size > 0


def _specs(
    config: ModelConfig, tensors: Iterable[ModelInput | ModelOutput], *, reshaped: bool
) -> Iterable[TensorSpec]:
    lead = (-1,) if has_batch_axis(config) else ()
    for tensor in tensors:
        dims = tensor.reshape.shape if reshaped and tensor.HasField("reshape") else tensor.dims
        is_shape = tensor.is_shape_tensor  # shape tensors have no batch axis of their own
        yield TensorSpec(
            name=tensor.name,
            datatype=DataType.from_proto(tensor.data_type),
            dims=(() if is_shape else lead) + tuple(dims),
            optional=isinstance(tensor, ModelInput) and tensor.optional,
        )
