"""Requests of different lengths in one batch: padded on the way in, cut back on the way out.

Pure. The plan comes from the config's `serving.padding` and `serving.unpadding`; for text encoders, which
say of themselves what is padding by an attention mask, it is derived. `scheduling` asks it how long a
request is, `Joiner` gets its rules.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from enginehouse.config.schema import ModelConfig, ModelInput, ModelOutput, ModelServing
from enginehouse.errors import InvalidArgument
from enginehouse.execution.joining import (
    InputRule,
    JoinedTensor,
    Joiner,
    OutputRule,
    element_sizes,
    split_rows,
)
from enginehouse.types import Array, DataType, InferRequest, Tensor, encode_bytes_elements

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
DEFAULT_MAX_WASTE = 0.1

_Spec = TypeVar("_Spec", ModelInput, ModelOutput)


@dataclass(frozen=True, slots=True)
class PaddedInput:
    """One input and the axis (batch axis counted) along which it is padded."""

    name: str
    datatype: DataType
    axis: int
    fill: bytes
    """One element of padding in wire layout."""
    pad_left: bool = False
    buckets: tuple[int, ...] = ()
    multiple_of: int = 1

    def target(self, lengths: Sequence[int]) -> int:
        """What a batch of requests of these lengths is padded to."""
        longest = max(lengths)
        position = bisect_left(self.buckets, longest)
        if position < len(self.buckets):
            return self.buckets[position]
        return -(-longest // self.multiple_of) * self.multiple_of

    def length_of(self, request: InferRequest) -> int:
        return request.inputs[self.name].shape[self.axis]


@dataclass(frozen=True, slots=True)
class FilledInput:
    """An input that the server makes: 1 for real and 0 for padding (`is_mask`), or each row's length."""

    name: str
    datatype: DataType
    source: PaddedInput
    is_mask: bool
    is_column: bool = False
    """Lengths have shape [rows, 1] instead of [rows]."""


@dataclass(frozen=True, slots=True)
class CutOutput:
    """An output and the axis (batch axis counted) that is cut to the length that `source` had."""

    name: str
    axis: int
    source: PaddedInput


@dataclass(frozen=True, slots=True)
class PaddingPlan:
    """Everything that one config says of padding. Falsy if nothing is padded."""

    inputs: tuple[PaddedInput, ...] = ()
    filled: tuple[FilledInput, ...] = ()
    outputs: tuple[CutOutput, ...] = ()
    max_waste: float = DEFAULT_MAX_WASTE

    def __bool__(self) -> bool:
        return bool(self.inputs)

    def length_of(self, request: InferRequest) -> int:
        """Along the first padded input that the request has."""
        return next((one.length_of(request) for one in self.inputs if one.name in request.inputs), 0)

    def target(self, lengths: Sequence[int]) -> int:
        return self.inputs[0].target(lengths)

    @classmethod
    def of(cls, config: ModelConfig) -> PaddingPlan:
        """Raises InvalidArgument if it names an input, output or axis that the model doesn't have."""
        if config.max_batch_size < 1:
            return cls()
        if not config.serving.padding:
            return _derived_plan(config)
        if config.backend == "python":
            raise InvalidArgument(
                f"model '{config.name}': serving.padding is for backends that take a batch as one tensor; "
                f"a model.py gets every request by itself"
            )
        inputs = {one.name: one for one in config.input}
        padded = [_padded_input(config, inputs, padding) for padding in config.serving.padding]
        filled: list[FilledInput] = []
        for padding, source in zip(config.serving.padding, list(padded), strict=True):
            if padding.mask_input:
                mask = _filled_input(config, inputs, padding.mask_input, source, is_mask=True)
                filled.append(mask)
                if all(one.name != mask.name for one in padded):  # clients may send it themselves
                    padded.append(replace(source, name=mask.name, datatype=mask.datatype, fill=_zero(mask.datatype)))
            if padding.length_input:
                filled.append(_filled_input(config, inputs, padding.length_input, source, is_mask=False))
        waste = max((padding.max_waste for padding in config.serving.padding), default=0.0)
        outputs = tuple(_cut_output(config, padded, one) for one in config.serving.unpadding)
        return cls(tuple(padded), tuple(filled), outputs, waste or DEFAULT_MAX_WASTE)


def _derived_plan(config: ModelConfig) -> PaddingPlan:
    """Models with `input_ids` and `attention_mask` of any length, unless `serving.no_derived_padding`."""
    texts = [one for one in config.input if one.name in TEXT_INPUTS and list(one.dims) == [-1]]
    names = {one.name for one in texts}
    is_text_encoder = {"input_ids", "attention_mask"} <= names and config.backend != "python"
    if not is_text_encoder or config.serving.no_derived_padding or config.HasField("sequence_batching"):
        return PaddingPlan()
    inputs = tuple(
        PaddedInput(one.name, kind, 1, _zero(kind)) for one in texts for kind in (DataType.from_proto(one.data_type),)
    )
    filled = tuple(
        FilledInput(one.name, DataType.from_proto(one.data_type), inputs[0], is_mask=True)
        for one in texts
        if one.name == "attention_mask" and one.optional
    )
    outputs = tuple(CutOutput(one.name, 1, inputs[0]) for one in config.output if one.dims and one.dims[0] == -1)
    return PaddingPlan(inputs, filled, outputs)


def _zero(datatype: DataType) -> bytes:
    return bytes(datatype.item_size or 4)


def _padded_input(config: ModelConfig, inputs: dict[str, ModelInput], padding: ModelServing.Padding) -> PaddedInput:
    spec = _known(config, inputs, padding.input, "serving.padding.input")
    if not 0 <= padding.axis < len(spec.dims) or spec.dims[padding.axis] >= 0:
        raise InvalidArgument(
            f"model '{config.name}': serving.padding of input '{spec.name}': axis {padding.axis} is not one of "
            f"variable size in dims {list(spec.dims)}"
        )
    datatype = DataType.from_proto(spec.data_type)
    if datatype is DataType.BYTES:
        fill = encode_bytes_elements(np.array([padding.text_value], dtype=object))
    elif datatype is DataType.BF16:
        fill = (np.array([padding.value], np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    else:
        fill = np.array([padding.value]).astype(datatype.numpy).tobytes()
    return PaddedInput(
        spec.name,
        datatype,
        padding.axis + 1,
        fill,
        padding.pad_left,
        tuple(sorted(padding.buckets)),
        padding.multiple_of or 1,
    )


def _filled_input(
    config: ModelConfig, inputs: dict[str, ModelInput], name: str, source: PaddedInput, is_mask: bool
) -> FilledInput:
    field_name = "serving.padding.mask_input" if is_mask else "serving.padding.length_input"
    spec = _known(config, inputs, name, field_name)
    if not spec.optional:
        raise InvalidArgument(
            f"model '{config.name}': {field_name} '{name}' is filled by the server, so the input must be optional"
        )
    return FilledInput(name, DataType.from_proto(spec.data_type), source, is_mask, is_column=bool(spec.dims))


def _cut_output(config: ModelConfig, padded: Sequence[PaddedInput], unpadding: ModelServing.Unpadding) -> CutOutput:
    outputs = {one.name: one for one in config.output}
    spec = _known(config, outputs, unpadding.output, "serving.unpadding.output")
    source = next((one for one in padded if one.name == (unpadding.input or padded[0].name)), None)
    if source is None:
        raise InvalidArgument(
            f"model '{config.name}': serving.unpadding.input '{unpadding.input}' is none of the padded inputs "
            f"{[one.name for one in padded]}"
        )
    if not 0 <= unpadding.axis < len(spec.dims):
        raise InvalidArgument(
            f"model '{config.name}': serving.unpadding of output '{spec.name}': there is no axis "
            f"{unpadding.axis} in dims {list(spec.dims)}"
        )
    return CutOutput(spec.name, unpadding.axis + 1, source)


def _known(config: ModelConfig, known: Mapping[str, _Spec], name: str, field_name: str) -> _Spec:
    if name not in known:
        raise InvalidArgument(
            f"model '{config.name}': {field_name} '{name}' is not in the config: it has {sorted(known)}"
        )
    return known[name]


# --- rules


def add_padding_rules(joiner: Joiner, plan: PaddingPlan) -> None:
    for padded in plan.inputs:
        joiner.input_rules[padded.name] = _pad_rule(padded)
    for filled in plan.filled:
        joiner.derived_inputs.append(_fill_rule(filled))
    for cut in plan.outputs:
        joiner.output_rules[cut.name] = _cut_rule(cut)


def _pad_rule(padded: PaddedInput) -> InputRule:
    axis = padded.axis

    def rule(name: str, requests: Sequence[InferRequest]) -> Sequence[JoinedTensor]:
        tensors = [request.inputs[name] for request in requests]
        target = padded.target([tensor.shape[axis] for tensor in tensors])
        parts: list[memoryview] = []
        for tensor in tensors:
            if tensor.shape[axis] == target:
                parts.append(tensor.host_data())
            else:
                parts.extend(_padded_parts(padded, tensor, target))
        first = tensors[0].shape
        shape = (sum(tensor.shape[0] for tensor in tensors), *first[1:axis], target, *first[axis + 1 :])
        return [JoinedTensor(name, padded.datatype, shape, parts, sum(part.nbytes for part in parts))]

    return rule


def _padded_parts(padded: PaddedInput, tensor: Tensor, target: int) -> Iterator[memoryview]:
    """The tensor's own bytes, each stretch along the axis with its padding. Nothing is copied."""
    axis, data = padded.axis, tensor.host_data()
    num_stretches = math.prod(tensor.shape[:axis])
    elements_per_step = math.prod(tensor.shape[axis + 1 :])
    length = tensor.shape[axis]
    filler = memoryview(padded.fill * ((target - length) * elements_per_step))
    sizes = element_sizes(padded.datatype, data, [length * elements_per_step] * num_stretches)
    start = 0
    for size in sizes:
        stretch = data[start : start + size]
        start += size
        if padded.pad_left:
            yield filler
            yield stretch
        else:
            yield stretch
            yield filler


def _fill_rule(filled: FilledInput) -> Callable[[Sequence[InferRequest]], Sequence[JoinedTensor]]:
    source = filled.source

    def rule(requests: Sequence[InferRequest]) -> Sequence[JoinedTensor]:
        if filled.name in requests[0].inputs:
            return []  # the clients sent it
        by_request = [source.length_of(request) for request in requests]
        lengths = np.repeat(by_request, [request.num_rows for request in requests])
        values: Array = lengths[:, None] if filled.is_column else lengths
        if filled.is_mask:
            positions = np.arange(source.target(by_request))
            if source.pad_left:
                positions = positions[::-1]
            values = positions < lengths[:, None]
        if filled.datatype is DataType.BF16:
            values = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        tensor = Tensor.from_numpy(filled.name, values.astype(filled.datatype.numpy), filled.datatype)
        data = tensor.host_data()
        return [JoinedTensor(filled.name, filled.datatype, tensor.shape, (data,), data.nbytes)]

    return rule


def _cut_rule(cut: CutOutput) -> OutputRule:
    source = cut.source

    def rule(output: Tensor, requests: Sequence[InferRequest]) -> Sequence[Tensor]:
        lengths = [source.length_of(request) for request in requests]
        target = source.target(lengths)
        pieces = split_rows(output, [request.num_rows for request in requests]) if len(requests) > 1 else [output]
        return [
            _cut(piece, cut.axis, length, target, source.pad_left)
            for piece, length in zip(pieces, lengths, strict=True)
        ]

    return rule


def _cut(piece: Tensor, axis: int, length: int, target: int, from_left: bool) -> Tensor:
    """Without the padding; as it is if the axis does not have the padded length after all."""
    if length == target or axis >= len(piece.shape) or piece.shape[axis] != target:
        return piece
    kept = slice(target - length, target) if from_left else slice(0, length)
    array = piece.numpy()[(slice(None),) * axis + (kept,)]
    return Tensor.from_numpy(piece.name, array, piece.datatype)
