"""Ragged batches: inputs of any size one after the other, and tensors that say where each request's begins.

Pure rules for `Joiner`. An input with `allow_ragged_batch` reaches the model as one flat tensor of all its
elements; `batch_input` adds tensors computed from the batch, `batch_output` says how to cut the outputs.
The kinds are those of ModelConfig.BatchInput and BatchOutput.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from enginehouse.config.schema import BatchInput, BatchOutput, ModelConfig
from enginehouse.errors import Internal
from enginehouse.execution.joining import JoinedTensor, Joiner, element_sizes
from enginehouse.types import Array, DataType, DeviceData, InferRequest, Tensor


def add_ragged_rules(joiner: Joiner, config: ModelConfig) -> None:
    """Installs what the config says of ragged inputs and of batch inputs and outputs."""
    for tensor in config.input:
        if tensor.allow_ragged_batch and config.max_batch_size > 0:
            joiner.input_rules[tensor.name] = flat_input
    for batch_input in config.batch_input:
        joiner.derived_inputs.append(_batch_input_rule(batch_input))
    for batch_output in config.batch_output:
        for name in batch_output.target_name:
            joiner.output_rules[name] = _scatter_rule(batch_output)


def flat_input(name: str, requests: Sequence[InferRequest]) -> Sequence[JoinedTensor]:
    """[elements of all requests]: neither the batch axis nor the requests' shapes are left."""
    tensors = [request.inputs[name] for request in requests]
    parts = [tensor.host_data() for tensor in tensors]
    shape = (sum(tensor.num_elements for tensor in tensors),)
    return [JoinedTensor(name, tensors[0].datatype, shape, parts, sum(part.nbytes for part in parts))]


Derive = Callable[[Sequence[Tensor]], Array]
"""The values of a batch input, given each request's source tensor (its first axis is the batch)."""


def _element_counts(sources: Sequence[Tensor]) -> Array:
    return np.array([source.num_elements for source in sources])


def _accumulated_counts(sources: Sequence[Tensor]) -> Array:
    return np.array(list(accumulate(source.num_elements for source in sources)))


def _accumulated_counts_with_zero(sources: Sequence[Tensor]) -> Array:
    return np.array(list(accumulate((source.num_elements for source in sources), initial=0)))


def _max_count_as_shape(sources: Sequence[Tensor]) -> Array:
    """Only its shape says something."""
    return np.zeros(max(source.num_elements for source in sources))


def _item_shapes(sources: Sequence[Tensor]) -> Array:
    """[rows of all requests, axes without the batch]."""
    return np.array([source.shape[1:] for source in sources for _ in range(source.shape[0])])


def _item_shapes_flat(sources: Sequence[Tensor]) -> Array:
    return _item_shapes(sources).reshape(-1)


_DERIVE: dict[int, Derive] = {
    BatchInput.BATCH_ELEMENT_COUNT: _element_counts,
    BatchInput.BATCH_ACCUMULATED_ELEMENT_COUNT: _accumulated_counts,
    BatchInput.BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO: _accumulated_counts_with_zero,
    BatchInput.BATCH_MAX_ELEMENT_COUNT_AS_SHAPE: _max_count_as_shape,
    BatchInput.BATCH_ITEM_SHAPE: _item_shapes,
    BatchInput.BATCH_ITEM_SHAPE_FLATTEN: _item_shapes_flat,
}


def _batch_input_rule(batch_input: BatchInput) -> Callable[[Sequence[InferRequest]], Sequence[JoinedTensor]]:
    derive = _DERIVE[batch_input.kind]
    source = batch_input.source_input[0]
    datatype = DataType.from_proto(batch_input.data_type)
    names = tuple(batch_input.target_name)

    def rule(requests: Sequence[InferRequest]) -> Sequence[JoinedTensor]:
        values = derive([request.inputs[source] for request in requests])
        tensor = Tensor.from_numpy(names[0], values.astype(datatype.numpy), datatype)
        data = tensor.host_data()
        return [JoinedTensor(name, datatype, tensor.shape, (data,), data.nbytes) for name in names]

    return rule


def _scatter_rule(batch_output: BatchOutput) -> Callable[[Tensor, Sequence[InferRequest]], Sequence[Tensor]]:
    """Cuts the output, taken as flat, into pieces that have the shapes of a source input."""
    source = batch_output.source_input[0]

    def rule(output: Tensor, requests: Sequence[InferRequest]) -> Sequence[Tensor]:
        shapes = [request.inputs[source].shape for request in requests]
        counts = [math.prod(shape) for shape in shapes]
        if sum(counts) != output.num_elements:
            raise Internal(
                f"output '{output.name}' has shape {list(output.shape)}, which can't be cut into the shapes "
                f"of input '{source}': {[list(shape) for shape in shapes]}"
            )
        data = output.data.to_host() if isinstance(output.data, DeviceData) else output.data
        bounds = list(accumulate(element_sizes(output.datatype, data, counts), initial=0))
        return [
            Tensor(output.name, output.datatype, shape, data[start:stop])
            for shape, start, stop in zip(shapes, bounds, bounds[1:], strict=False)
        ]

    return rule
