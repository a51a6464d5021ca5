"""What an artifact says of its tensors, and how a config is completed from that and checked against it.

Shared by the backends whose artifacts describe themselves. Pure: no file is read and nothing is loaded here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.types import DataType, Tensor, TensorSpec

DEFAULT_MAX_BATCH_SIZE = 4


@dataclass(frozen=True, slots=True)
class Signature:
    """`file` is for messages. Dims include the batch axis; -1 is any size."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batches: bool | None = None
    """Whether axis 0 of everything is the batch; None leaves it to the rule: it does if all are free."""
    unusable: Mapping[str, str] = field(default_factory=dict)
    """Outputs that no tensor type can hold, and what they are."""

    @property
    def can_batch(self) -> bool:
        if self.batches is not None:
            return self.batches
        required = [spec for spec in (*self.inputs, *self.outputs) if not spec.optional]
        return bool(required) and all(spec.dims and spec.dims[0] == -1 for spec in required)


def complete_config(
    config: ModelConfig, signature: Signature, default_max_batch_size: int = DEFAULT_MAX_BATCH_SIZE
) -> ModelConfig:
    """The config with what it leaves open: tensors, data types, dims, batch size and dynamic batching.

    A config that lists inputs and outputs has said whether it batches. Raises InvalidArgument if it wants
    batches from a model whose first dimensions are fixed.
    """
    completed = ModelConfig()
    completed.CopyFrom(config)
    if not (config.input and config.output):
        _complete_batching(completed, signature, default_max_batch_size)
    wired = _wired_names(completed)
    _complete_tensors(completed, completed.input, signature.inputs, wired)
    _complete_tensors(completed, completed.output, signature.outputs, wired)
    return completed


def _complete_batching(config: ModelConfig, signature: Signature, default_max_batch_size: int) -> None:
    if config.max_batch_size > 0:
        if not signature.can_batch:
            raise InvalidArgument(
                f"autofill failed for model '{config.name}': model does not support batching while non-zero "
                f"max_batch_size is specified ({signature.file} fixes the first dimension of a tensor)"
            )
        return
    if not signature.can_batch or default_max_batch_size < 1:
        return
    config.max_batch_size = default_max_batch_size
    if default_max_batch_size > 1 and config.WhichOneof("scheduling_choice") is None:
        config.dynamic_batching.SetInParent()


def _wired_names(config: ModelConfig) -> set[str]:
    """Tensors that the server makes or keeps itself, so that no client sends or gets them."""
    names = {control.name for control in config.sequence_batching.control_input}
    for state in config.sequence_batching.state:
        names |= {state.input_name, state.output_name}
    for derived_input in config.batch_input:
        names.update(derived_input.target_name)
    return names


def _complete_tensors(config: ModelConfig, entries: Any, specs: Sequence[TensorSpec], wired: set[str]) -> None:
    """Fills gaps of listed tensors; lists all when none is."""
    has_batch_axis = config.max_batch_size > 0
    if not entries:
        for spec in specs:
            if spec.name not in wired and not spec.optional:
                entries.add(name=spec.name)
    by_name = {spec.name: spec for spec in specs}
    for entry in entries:
        if entry.name not in by_name:
            continue  # check_config names it
        known = by_name[entry.name]
        if not entry.data_type:
            entry.data_type = known.datatype.proto
        if not entry.dims and not entry.HasField("reshape"):
            dims = known.dims[1:] if has_batch_axis else known.dims
            entry.dims.extend(dims or (1,))
            if not dims:  # a config can't say "no dimensions", so clients see [1]
                entry.reshape.SetInParent()


def check_config(config: ModelConfig, signature: Signature) -> None:
    """Raises InvalidArgument, naming the file, for the first thing in which config and artifact differ."""
    wired = _wired_names(config)
    _check_listed(config, "input", config.input, signature.inputs, signature.file)
    _check_listed(config, "output", config.output, signature.outputs, signature.file, signature.unusable)
    known = {spec.name for spec in (*signature.inputs, *signature.outputs)}
    for name in sorted(wired - known):
        raise InvalidArgument(
            f"model '{config.name}': the config's sequence_batching or batch_input names the tensor "
            f"'{name}', {signature.file} has {_names(known)}"
        )
    listed = {entry.name for entry in config.input} | wired
    missing = [spec.name for spec in signature.inputs if not spec.optional and spec.name not in listed]
    if missing:
        raise InvalidArgument(
            f"unable to load model '{config.name}', configuration expects {len(config.input)} inputs, model "
            f"provides {len(config.input) + len(missing)}: {signature.file} also needs {_names(missing)}"
        )
    filled = _filled_names(config)
    for entry in config.input:
        if entry.optional and entry.name not in filled and not _spec(signature.inputs, entry.name).optional:
            raise InvalidArgument(
                f"model '{config.name}': the config says that input '{entry.name}' is optional, but "
                f"{signature.file} has no default for it"
            )


def _filled_names(config: ModelConfig) -> set[str]:
    """Optional inputs that the server makes where a client leaves them out."""
    padding = config.serving.padding
    return {one.mask_input for one in padding} | {one.length_input for one in padding}


def _spec(specs: Sequence[TensorSpec], name: str) -> TensorSpec:
    return next(spec for spec in specs if spec.name == name)


def _check_listed(
    config: ModelConfig,
    kind: str,
    entries: Iterable[Any],
    specs: Sequence[TensorSpec],
    file: str,
    unusable: Mapping[str, str] | None = None,
) -> None:
    by_name = {spec.name: spec for spec in specs}
    for entry in entries:
        if unusable and entry.name in unusable:
            raise InvalidArgument(
                f"model '{config.name}': {kind} '{entry.name}' of {file} is a {unusable[entry.name]}, which "
                f"no tensor can hold; allowed {kind}s are {_names(by_name)}"
            )
        if entry.name not in by_name:
            raise InvalidArgument(
                f"unexpected inference {kind} '{entry.name}' in the config of model '{config.name}', allowed "
                f"{kind}s are: {_names(by_name)}{_nearest(entry.name, by_name)} ({file})"
            )
        spec = by_name[entry.name]
        if entry.data_type != spec.datatype.proto:
            found = DataType.from_proto(entry.data_type).config_name if entry.data_type else "TYPE_INVALID"
            raise InvalidArgument(
                f"unable to load model '{config.name}', configuration expects datatype {found} for {kind} "
                f"'{entry.name}', model provides {spec.datatype.config_name} ({file})"
            )
        _check_dims(config, kind, entry, spec, file)


def _check_dims(config: ModelConfig, kind: str, entry: Any, spec: TensorSpec, file: str) -> None:
    if kind == "output" and any(entry.name in derived.target_name for derived in config.batch_output):
        return  # cut from whatever shape the model gives it
    if kind == "input" and entry.allow_ragged_batch and config.max_batch_size > 0:
        if spec.dims != (-1,):
            raise InvalidArgument(
                f"unable to load model '{config.name}', input '{entry.name}' has allow_ragged_batch and reaches the "
                f"model as one flat tensor, but the model provides {list(spec.dims)} ({file})"
            )
        return
    dims = tuple(entry.reshape.shape) if entry.HasField("reshape") else tuple(entry.dims)
    full = (-1, *dims) if config.max_batch_size > 0 else dims
    if config.max_batch_size == 1 and spec.dims[:1] == (1,):
        full = (1, *dims)
    fits = len(full) == len(spec.dims) and all(
        theirs in (-1, ours) for ours, theirs in zip(full, spec.dims, strict=True)
    )
    if not fits:
        batch_note = (
            f" (max_batch_size is {config.max_batch_size}, so the batch is a first dimension before the "
            f"config's {list(dims)})"
            if config.max_batch_size > 0
            else " (max_batch_size is 0, so there is no batch dimension before them)"
        )
        raise InvalidArgument(
            f"unable to load model '{config.name}', configuration expects shape {list(full)} for {kind} "
            f"'{entry.name}'{batch_note}, model provides {list(spec.dims)} ({file})"
        )


class InputChecker:
    """What a batch's inputs must be, checked before the framework sees them."""

    def __init__(self, model_name: str, inputs: Sequence[TensorSpec], optional: Iterable[str] = ()) -> None:
        self._model_name = model_name
        self._datatype_by_name = {spec.name: spec.datatype for spec in inputs}
        skippable = {spec.name for spec in inputs if spec.optional} | set(optional)
        self._required = frozenset(self._datatype_by_name) - skippable

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raises InvalidArgument for a missing or unknown input or a wrong data type."""
        for name, tensor in inputs.items():
            expected = self._datatype_by_name.get(name)
            if expected is None:
                raise InvalidArgument(
                    f"unexpected inference input '{name}' for model '{self._model_name}', allowed inputs "
                    f"are: {_names(self._datatype_by_name)}{_nearest(name, self._datatype_by_name)}"
                )
            if tensor.datatype is not expected:
                raise InvalidArgument(
                    f"inference input '{name}' for model '{self._model_name}' has data-type "
                    f"{tensor.datatype.wire_name}, but the model expects {expected.wire_name}"
                )
        if not inputs.keys() >= self._required:
            missing = sorted(self._required - inputs.keys())
            raise InvalidArgument(
                f"expected {len(self._required)} inputs but got {len(inputs)} inputs for model "
                f"'{self._model_name}': {_names(missing)} missing"
            )


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _nearest(name: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
