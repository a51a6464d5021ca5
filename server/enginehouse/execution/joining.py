"""Which bytes of which requests make up a batch's tensors, and how its outputs go back to the requests.

Pure: plans name views of the requests' own memory and copy nothing; `write` puts a plan into memory that
the caller owns (an array, a slab), so a batch is written exactly once. A new way to combine tensors
(ragged, padded, computed) is another function of that shape in `Joiner.input_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from enginehouse.errors import Internal
from enginehouse.types import DataType, DeviceData, InferRequest, Tensor

if TYPE_CHECKING:
    from enginehouse.config.schema import ModelConfig


@dataclass(frozen=True, slots=True)
class JoinedTensor:
    """One tensor of the batch: the bytes of `parts` one after the other fill `shape`."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    parts: Sequence[memoryview]
    nbytes: int

    def write(self, target: memoryview) -> None:
        """Copies the parts to the start of `target`."""
        offset = 0
        for part in self.parts:
            end = offset + part.nbytes
            target[offset:end] = part
            offset = end

    def gather(self) -> Tensor:
        """In this process: a view where there is one part, else one copy."""
        if len(self.parts) == 1:
            return Tensor(self.name, self.datatype, self.shape, self.parts[0])
        data = np.empty(self.nbytes, dtype=np.uint8).data
        self.write(data)
        return Tensor(self.name, self.datatype, self.shape, data)


InputRule: TypeAlias = Callable[[str, Sequence[InferRequest]], Sequence[JoinedTensor]]
"""The tensors that the model sees for one input of the batch: usually one, more where lengths go along."""
OutputRule: TypeAlias = Callable[[Tensor, Sequence[InferRequest]], Sequence[Tensor]]
"""One output of the batch as one tensor for each request, in their order."""


@dataclass(frozen=True, slots=True)
class Reshape:
    """A config's `reshape`: how the model's shape differs from the client's (batch axis not counted)."""

    dims: tuple[int, ...]
    shape: tuple[int, ...]

    def to_model(self, shape: Sequence[int], has_batch_axis: bool) -> tuple[int, ...]:
        return _reshape(shape, self.dims, self.shape, has_batch_axis)

    def to_client(self, shape: Sequence[int], has_batch_axis: bool) -> tuple[int, ...]:
        return _reshape(shape, self.shape, self.dims, has_batch_axis)


def _reshape(
    shape: Sequence[int], source: Sequence[int], target: Sequence[int], has_batch_axis: bool
) -> tuple[int, ...]:
    """`target` with its variable dimensions taken in order from those of `shape`, which is like `source`."""
    first = 1 if has_batch_axis else 0
    actual = shape[first:]
    if len(actual) != len(source):
        return tuple(shape)
    variable = iter(size for size, dim in zip(actual, source, strict=True) if dim == -1)
    resized = tuple(next(variable, -1) if dim == -1 else dim for dim in target)
    if -1 in resized or math.prod(resized) != math.prod(actual):
        return tuple(shape)
    return (*shape[:first], *resized)


class Joiner:
    """What one version's config says about combining its requests. `input_rules` and `output_rules` hold
    the tensors that don't follow the plain rule (along the batch axis); by name."""

    def __init__(
        self,
        has_batch_axis: bool,
        output_names: Sequence[str] = (),
        input_reshapes: Mapping[str, Reshape] | None = None,
        output_reshapes: Mapping[str, Reshape] | None = None,
    ) -> None:
        self.has_batch_axis = has_batch_axis
        self.output_names = frozenset(output_names)
        self.input_reshapes = dict(input_reshapes or {})
        self.output_reshapes = dict(output_reshapes or {})
        self.state_outputs: frozenset[str] = frozenset()
        """Outputs that the scheduler keeps for the sequence: they come along whatever a request asks for."""
        self.input_rules: dict[str, InputRule] = {}
        self.output_rules: dict[str, OutputRule] = {}
        self.derived_inputs: list[Callable[[Sequence[InferRequest]], Sequence[JoinedTensor]]] = []
        """Tensors that no request sends: computed from the whole batch."""

    @classmethod
    def of_config(cls, config: ModelConfig) -> Joiner:
        states = [state.output_name for state in config.sequence_batching.state]
        joiner = cls(
            config.max_batch_size > 0,
            [output.name for output in config.output] + states,
            {t.name: Reshape(tuple(t.dims), tuple(t.reshape.shape)) for t in config.input if t.HasField("reshape")},
            {t.name: Reshape(tuple(t.dims), tuple(t.reshape.shape)) for t in config.output if t.HasField("reshape")},
        )
        joiner.state_outputs = frozenset(states)
        return joiner

    # --- inputs

    def join(self, requests: Sequence[InferRequest]) -> list[JoinedTensor]:
        """The batch's tensors. Inputs that only some requests carry are an error of the batch's maker."""
        joined: list[JoinedTensor] = []
        for name in requests[0].inputs:
            rule = self.input_rules.get(name)
            if rule is not None:
                joined.extend(rule(name, requests))
            else:
                joined.append(self._along_batch_axis(name, requests))
        for derive in self.derived_inputs:
            joined.extend(derive(requests))
        return joined

    def _along_batch_axis(self, name: str, requests: Sequence[InferRequest]) -> JoinedTensor:
        first = requests[0].inputs[name]
        shape = self.model_shape(first)
        if len(requests) == 1:
            data = first.host_data()
            return JoinedTensor(name, first.datatype, shape, (data,), data.nbytes)
        parts = [request.inputs[name].host_data() for request in requests]
        rows = sum(request.inputs[name].shape[0] for request in requests)
        return JoinedTensor(name, first.datatype, (rows, *shape[1:]), parts, sum(p.nbytes for p in parts))

    def model_inputs(self, request: InferRequest) -> dict[str, Tensor]:
        """One request's own inputs as a model sees them that takes requests one by one."""
        if not self.input_reshapes:
            return request.inputs
        return {
            name: Tensor(name, tensor.datatype, self.model_shape(tensor), tensor.data)
            for name, tensor in request.inputs.items()
        }

    def model_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The tensor's shape as the model sees it."""
        reshape = self.input_reshapes.get(tensor.name) if self.input_reshapes else None
        return reshape.to_model(tensor.shape, self.has_batch_axis) if reshape else tensor.shape

    # --- outputs

    def requested_outputs(self, requests: Sequence[InferRequest]) -> list[str]:
        """What a whole batch must compute; empty for everything."""
        names: dict[str, None] = dict.fromkeys(self.state_outputs)
        for request in requests:
            if not request.requested_outputs:
                return []
            names.update(dict.fromkeys(request.requested_outputs))
        return list(names)

    def split(self, requests: Sequence[InferRequest], outputs: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """Each request's own outputs as views of the batch's, in the model's order.

        Raises Internal when an output's rows are not the batch's.
        """
        answers: list[list[Tensor]] = [[] for _ in requests]
        for output in outputs.values():
            if output.name not in self.output_names:
                continue
            rule = self.output_rules.get(output.name)
            if rule is not None:
                pieces: Sequence[Tensor] = rule(output, requests)
            elif len(requests) == 1:
                pieces = (output,)
            else:
                pieces = split_rows(output, [request.num_rows for request in requests])
            for request, answer, piece in zip(requests, answers, pieces, strict=True):
                if self._is_wanted(piece.name, request):
                    answer.append(self.client_output(piece))
        return answers

    def pick(self, request: InferRequest, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Of the outputs made for one request, those that it asked for and the config knows."""
        return [
            self.client_output(output)
            for output in outputs
            if output.name in self.output_names and self._is_wanted(output.name, request)
        ]

    def _is_wanted(self, name: str, request: InferRequest) -> bool:
        wanted = request.requested_outputs
        return not wanted or name in wanted or name in self.state_outputs

    def client_output(self, output: Tensor) -> Tensor:
        """The output with the shape that clients see."""
        reshape = self.output_reshapes.get(output.name) if self.output_reshapes else None
        if reshape is None:
            return output
        shape = reshape.to_client(output.shape, self.has_batch_axis)
        return Tensor(output.name, output.datatype, shape, output.data)


def split_rows(output: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Cuts a tensor along axis 0 into pieces of that many rows, all views of its memory."""
    total = sum(rows)
    if not output.shape or output.shape[0] != total:
        raise Internal(
            f"output '{output.name}' has shape {list(output.shape)}, but the batch has {total} rows and "
            f"the model's config says that the first dimension is the batch"
        )
    data = output.data.to_host() if isinstance(output.data, DeviceData) else output.data
    bounds = _row_bounds(output, data, rows)
    return [
        Tensor(output.name, output.datatype, (count, *output.shape[1:]), data[start:stop])
        for count, start, stop in zip(rows, bounds, bounds[1:], strict=False)
    ]


def _row_bounds(output: Tensor, data: memoryview, rows: Sequence[int]) -> list[int]:
    """Byte offsets where each piece starts, and the end of the last."""
    elements_per_row = math.prod(output.shape[1:])
    bounds = [0]
    if output.datatype is not DataType.BYTES:
        row_bytes = elements_per_row * output.datatype.item_size
        for count in rows:
            bounds.append(bounds[-1] + count * row_bytes)
        return bounds
    offset = 0
    for count in rows:
        for _ in range(count * elements_per_row):
            offset += 4 + int.from_bytes(data[offset : offset + 4], "little")
        bounds.append(offset)
    return bounds
