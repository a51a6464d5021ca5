"""Which bytes of which requests make up a batch's tensors, and how its outputs go back to the requests.

Pure: plans name views of the requests' own memory and copy nothing; `write` puts a plan into memory that
the caller owns (an array, a slab), so a batch is written exactly once. A new way to combine tensors
(ragged, padded, computed) is another function of that shape in `Joiner.input_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from enginehouse.errors import Internal
from enginehouse.execution.held import HeldData
from enginehouse.types import DataType, DeviceData, InferRequest, Tensor

if TYPE_CHECKING:
    from enginehouse.config.schema import ModelConfig


@dataclass(frozen=True, slots=True)
class JoinedTensor:
    """One tensor of the batch: the bytes of `parts` one after the other fill `shape`."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    parts: Sequence[memoryview | HeldData]
    nbytes: int
    """Of the parts in host memory."""
    is_held: bool = False
    """Whether some part lies in the memory of a worker."""

    def write(self, target: memoryview) -> None:
        """Copies the parts that are in host memory to the start of `target`."""
        offset = 0
        for part in self.parts:
            if isinstance(part, HeldData):
                continue
            end = offset + part.nbytes
            target[offset:end] = part
            offset = end

    def gather(self) -> Tensor:
        """In this process: a view where there is one part, else one copy."""
        assert not self.is_held, "a bug: held tensors are read where they are held"
        if len(self.parts) == 1:
            return Tensor(self.name, self.datatype, self.shape, self.parts[0])
        data = np.empty(self.nbytes, dtype=np.uint8).data
        self.write(data)
        return Tensor(self.name, self.datatype, self.shape, data)


InputRule: TypeAlias = Callable[[str, Sequence[InferRequest]], Sequence[JoinedTensor]]
"""The tensors that the model sees for one input of the batch: usually one, more where lengths go along."""
OutputRule: TypeAlias = Callable[[Tensor, Sequence[InferRequest]], Sequence[Tensor]]
"""One output of the batch as one tensor for each request, in their order."""


class Joiner:
    """What one version's config says about combining its requests. `input_rules` and `output_rules` hold
    the tensors that don't follow the plain rule (along the batch axis); by name."""

    def __init__(self, output_names: Sequence[str] = (), state_output_names: Sequence[str] = ()) -> None:
        self.output_names = frozenset(output_names)
        self.state_output_names = frozenset(state_output_names)
        """Given whether they were asked for or not: the sequence scheduler takes them."""
        self.input_rules: dict[str, InputRule] = {}
        self.output_rules: dict[str, OutputRule] = {}
        self.derived_inputs: list[Callable[[Sequence[InferRequest]], Sequence[JoinedTensor]]] = []
        """Tensors that no request sends: computed from the whole batch."""

    @classmethod
    def of_config(cls, config: ModelConfig) -> Joiner:
        states = [state.output_name for state in config.sequence_batching.state]
        return cls([output.name for output in config.output], states)

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
        shape = first.shape
        if len(requests) == 1 and type(first.data) is memoryview:
            return JoinedTensor(name, first.datatype, shape, (first.data,), first.data.nbytes)
        parts = [held_or_host(request.inputs[name].data) for request in requests]
        if len(requests) > 1:
            shape = (sum(request.inputs[name].shape[0] for request in requests), *shape[1:])
        in_host = sum([part.nbytes for part in parts if type(part) is memoryview])
        is_held = any(type(part) is not memoryview for part in parts)
        return JoinedTensor(name, first.datatype, shape, parts, in_host, is_held)

    # --- outputs

    def requested_outputs(self, requests: Sequence[InferRequest]) -> list[str]:
        """What a whole batch must compute; empty for everything."""
        names: dict[str, None] = dict.fromkeys(self.state_output_names)
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
            if output.name not in self.output_names and output.name not in self.state_output_names:
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
                    answer.append(piece)
        return answers

    def pick(self, request: InferRequest, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Of the outputs made for one request, those that it asked for and the config knows."""
        return [output for output in outputs if self._is_wanted(output.name, request)]

    def _is_wanted(self, name: str, request: InferRequest) -> bool:
        return name in (request.requested_outputs or self.output_names) or name in self.state_output_names


def split_rows(output: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Cuts a tensor along axis 0 into pieces of that many rows, all views of its memory."""
    total = sum(rows)
    if not output.shape or output.shape[0] != total:
        raise Internal(
            f"output '{output.name}' has shape {list(output.shape)}, but the batch has {total} rows and "
            f"the model's config says that the first dimension is the batch"
        )
    data = held_or_host(output.data)
    elements_per_row = math.prod(output.shape[1:])
    counts = [count * elements_per_row for count in rows]
    if isinstance(data, HeldData):
        assert output.datatype is not DataType.BYTES, "a bug: strings are never held, nobody could cut them"
        sizes = [count * output.datatype.item_size for count in counts]
    else:
        sizes = element_sizes(output.datatype, data, counts)
    bounds = list(accumulate(sizes, initial=0))
    return [
        Tensor(output.name, output.datatype, (count, *output.shape[1:]), range_of(data, start, stop))
        for count, start, stop in zip(rows, bounds, bounds[1:], strict=False)
    ]


def held_or_host(data: memoryview | DeviceData) -> memoryview | HeldData:
    """What a worker holds stays there; other device memory comes to the host."""
    return data if isinstance(data, memoryview | HeldData) else data.to_host()


def range_of(data: memoryview | HeldData, start: int, stop: int) -> memoryview | HeldData:
    return data[start:stop] if isinstance(data, memoryview) else data.part(start, stop - start)


def element_sizes(datatype: DataType, data: memoryview, counts: Sequence[int]) -> list[int]:
    """How many bytes so many elements each have, one run after the other."""
    if datatype is not DataType.BYTES:
        return [count * datatype.item_size for count in counts]
    sizes, offset = [], 0
    for count in counts:
        start = offset
        for _ in range(count):
            offset += 4 + int.from_bytes(data[offset : offset + 4], "little")
        sizes.append(offset - start)
    return sizes
