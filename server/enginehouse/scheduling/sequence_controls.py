"""The control tensors that tell a model where a request stands in its sequence. No I/O and no clock here.

START, END and READY are a false or a true value of the type that the config gives them; CORRID is the
correlation id. All have shape [1], or [1, 1] for models that batch.
"""

from __future__ import annotations

import struct

import numpy as np

from enginehouse.config.schema import ModelConfig, ModelSequenceBatching
from enginehouse.errors import InvalidArgument
from enginehouse.types import Array, CorrelationId, DataType, Tensor

_Control = ModelSequenceBatching.Control


class SequenceControls:
    """The controls that one model's config asks for."""

    def __init__(self, config: ModelConfig) -> None:
        self._model = config.name
        self._shape = (1, 1) if config.max_batch_size > 0 else (1,)
        self._switches: dict[int, list[tuple[Tensor, Tensor]]] = {}
        """False and true tensor, by kind."""
        self._correlation: tuple[str, DataType] | None = None
        for control_input in config.sequence_batching.control_input:
            for control in control_input.control:
                if control.kind == _Control.CONTROL_SEQUENCE_CORRID:
                    self._correlation = (control_input.name, DataType.from_proto(control.data_type))
                else:
                    pair = self._switch(control_input.name, control)
                    self._switches.setdefault(control.kind, []).append(pair)

    def tensors(self, correlation_id: CorrelationId, *, start: bool, end: bool, ready: bool = True) -> list[Tensor]:
        """What to add to a request's inputs."""
        states = (
            (_Control.CONTROL_SEQUENCE_START, start),
            (_Control.CONTROL_SEQUENCE_END, end),
            (_Control.CONTROL_SEQUENCE_READY, ready),
        )
        tensors = [pair[state] for kind, state in states for pair in self._switches.get(kind, ())]
        if self._correlation is not None:
            tensors.append(self._correlation_tensor(*self._correlation, correlation_id))
        return tensors

    def check(self, correlation_id: CorrelationId) -> None:
        """Raises InvalidArgument for an id that the model's CORRID control can't hold."""
        if self._correlation is None or not isinstance(correlation_id, str):
            return
        name, datatype = self._correlation
        if datatype is not DataType.BYTES:
            raise InvalidArgument(
                f"inference request for sequence {correlation_id} to model '{self._model}' has a text "
                f"correlation ID, but the control '{name}' is {datatype.config_name}: use a number"
            )

    def _switch(self, name: str, control: ModelSequenceBatching.Control) -> tuple[Tensor, Tensor]:
        if control.int32_false_true:
            values: Array = np.array(control.int32_false_true, np.int32)
        elif control.fp32_false_true:
            values = np.array(control.fp32_false_true, np.float32)
        else:
            values = np.array(control.bool_false_true, np.bool_)
        false, true = (Tensor.from_numpy(name, values[i].reshape(self._shape)) for i in (0, 1))
        return false, true

    def _correlation_tensor(self, name: str, datatype: DataType, correlation_id: CorrelationId) -> Tensor:
        if datatype is DataType.BYTES:
            text = str(correlation_id).encode() if correlation_id else b""
            return Tensor(name, datatype, self._shape, memoryview(struct.pack("<I", len(text)) + text))
        number = correlation_id if isinstance(correlation_id, int) else 0
        size = datatype.item_size  # narrow types get the low bytes
        return Tensor(name, datatype, self._shape, memoryview((number % 2**64).to_bytes(8, "little")[:size]))
