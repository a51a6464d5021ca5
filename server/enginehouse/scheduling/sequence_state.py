"""Implicit state: tensors that the server keeps for a sequence between its requests.

Each state is an output of one request and an input of the next. Initial values come from the config: zeros,
or the bytes of a file in the model's `initial_state` folder (read once, when the model is loaded).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from enginehouse.config.schema import ModelConfig, ModelSequenceBatching
from enginehouse.errors import Internal, InvalidArgument
from enginehouse.types import DataType, DeviceData, Tensor


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One state of the model. `initial` is what a sequence starts with."""

    input_name: str
    output_name: str
    initial: Tensor


class SequenceStates:
    """The states that a model's config declares. Falsy if there are none."""

    def __init__(self, config: ModelConfig, model_directory: Path | None = None) -> None:
        """Raises InvalidArgument if an initial state doesn't fit its state, Internal if its file can't be read."""
        self.specs: list[StateSpec] = []
        for state in config.sequence_batching.state:
            if any(spec.input_name == state.input_name for spec in self.specs):
                raise InvalidArgument(f"State input name '{state.input_name}' specified more than once.")
            initial = _initial_tensor(state, config.max_batch_size > 0, model_directory)
            self.specs.append(StateSpec(state.input_name, state.output_name, initial))
        self.output_names = [spec.output_name for spec in self.specs]
        visible = {output.name for output in config.output}
        self._hidden = {name for name in self.output_names if name not in visible}
        """Outputs that no client sees."""

    def __bool__(self) -> bool:
        return bool(self.specs)

    def initial(self) -> dict[str, Tensor]:
        """By input name, for a sequence that starts."""
        return {spec.input_name: spec.initial for spec in self.specs}

    def after(self, before: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """The states once a request was answered with these outputs; those that it lacks stay."""
        made = {output.name: output for output in outputs}
        states = dict(before)
        for spec in self.specs:
            output = made.get(spec.output_name)
            if output is not None:
                states[spec.input_name] = Tensor(spec.input_name, output.datatype, output.shape, _own(output.data))
        return states

    def client_outputs(self, outputs: Sequence[Tensor], requested: Sequence[str]) -> list[Tensor]:
        """Without those that only the server wanted."""
        return [
            output
            for output in outputs
            if output.name not in self._hidden and (not requested or output.name in requested)
        ]


def _own(data: memoryview | DeviceData) -> memoryview | DeviceData:
    """A state outlives its batch: a small view would keep all of the batch's memory."""
    if isinstance(data, DeviceData):
        return data
    whole = data.obj
    return data if isinstance(whole, bytes) and len(whole) == data.nbytes else memoryview(bytes(data))


def zeros(name: str, datatype: DataType, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros, or of empty strings."""
    return Tensor(name, datatype, shape, memoryview(bytes(math.prod(shape) * (datatype.item_size or 4))))


def _initial_tensor(state: ModelSequenceBatching.State, batching: bool, folder: Path | None) -> Tensor:
    if not state.data_type:
        raise InvalidArgument(f"state '{state.input_name}' has no data_type: name the type of its tensors")
    datatype = DataType.from_proto(state.data_type)
    batch = (1,) if batching else ()
    if not state.initial_state:
        dims = tuple(1 if dim < 0 else dim for dim in state.dims)
        return zeros(state.input_name, datatype, batch + dims)
    if len(state.initial_state) > 1:
        raise InvalidArgument(
            f"initial_state field for state input '{state.input_name}' must contain exactly one or zero "
            f"element. Found '{len(state.initial_state)}' elements."
        )
    initial = state.initial_state[0]
    _check_initial(state, initial)
    shape = batch + tuple(initial.dims)
    if initial.WhichOneof("state_data") == "zero_data":
        return zeros(state.input_name, datatype, shape)
    if initial.WhichOneof("state_data") == "data_file":
        data = _read_initial(initial.data_file, folder, datatype, shape)
        return Tensor(state.input_name, datatype, shape, memoryview(data))
    raise InvalidArgument(f"initial_state setting expects state'{state.input_name}' to have state_data set")


def _check_initial(state: ModelSequenceBatching.State, initial: ModelSequenceBatching.InitialState) -> None:
    name = state.input_name
    if initial.data_type != state.data_type:
        raise InvalidArgument(
            f"The data type used for 'initial_state' field of state '{name}' does not match the state data type."
        )
    if not initial.name:
        raise InvalidArgument(f"Field 'name' must be set when using initial_state for state input '{name}'.")
    if len(initial.dims) != len(state.dims):
        raise InvalidArgument(
            f"Number of dimensions in 'initial_state' doesn't match the size of 'state' dimensions for state "
            f"input '{name}'. {len(initial.dims)} != {len(state.dims)}"
        )
    for found, declared in zip(initial.dims, state.dims, strict=True):
        if found < 0:
            raise InvalidArgument(f"'initial_state' field for state input name '{name}' contains variable dimensions.")
        if declared >= 0 and found != declared:
            raise InvalidArgument(
                f"'initial_state' dim for input name '{name}' doesn't match 'state' dim description. "
                f"{found} != {declared}"
            )


def _read_initial(file: str, folder: Path | None, datatype: DataType, shape: tuple[int, ...]) -> bytes:
    path = (folder or Path()) / "initial_state" / file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Internal(f"failed to open text file for read {path}: {error.strerror}") from error
    if datatype is DataType.BYTES:
        return data
    size = math.prod(shape) * datatype.item_size
    if len(data) < size:
        raise InvalidArgument(
            f"initial_state setting expects {size} bytes, but the data provided from {file}only has {len(data)} bytes."
        )
    return data[:size]
