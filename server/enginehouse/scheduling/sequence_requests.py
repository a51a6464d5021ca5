"""What the model sees of a request that belongs to a sequence: control tensors, states, null requests.

No I/O and no clock here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from enginehouse.errors import InvalidArgument
from enginehouse.scheduling.queue import Ticket
from enginehouse.scheduling.sequence_book import SequenceRun
from enginehouse.scheduling.sequence_controls import SequenceControls
from enginehouse.scheduling.sequence_state import SequenceStates, zeros
from enginehouse.types import InferRequest, InferResponse


@dataclass(frozen=True, slots=True)
class SequenceRequests:
    """How one version's requests are checked and completed."""

    model_name: str
    controls: SequenceControls
    states: SequenceStates
    shape_key: Callable[[InferRequest], Hashable]

    def check(self, request: InferRequest) -> None:
        """Raises InvalidArgument for a request that can't belong to a sequence of this model."""
        if request.batch_size > 1:
            raise InvalidArgument(
                f"inference request to model '{self.model_name}' must specify batch-size 1 due to requirements of "
                f"sequence batcher"
            )
        if not request.correlation_id:
            raise InvalidArgument(
                f"inference request to model '{self.model_name}' must specify a non-zero or non-empty correlation ID"
            )
        self.controls.check(request.correlation_id)

    def prepare(self, sequence: SequenceRun, ticket: Ticket) -> None:
        """Before the sequence's next request may be cut: states of different shapes can't share a batch."""
        if self.states:
            if ticket.request.sequence_start:
                sequence.states = self.states.initial()
            shapes = tuple(state.shape for state in sequence.states.values())
            ticket.shape_key = (self.shape_key(ticket.request), shapes)

    def complete(self, sequence: SequenceRun, request: InferRequest) -> None:
        """Adds to the request's inputs what the server knows of its sequence."""
        for tensor in self.controls.tensors(
            request.correlation_id, start=request.sequence_start, end=request.sequence_end
        ):
            request.inputs[tensor.name] = tensor
        request.inputs.update(sequence.states)

    def null_request(self, pattern: InferRequest) -> InferRequest:
        """A row that nobody asked for: inputs of the same shape as the others', READY false."""
        inputs = {name: zeros(name, tensor.datatype, tensor.shape) for name, tensor in pattern.inputs.items()}
        for tensor in self.controls.tensors(0, start=False, end=False, ready=False):
            inputs[tensor.name] = tensor
        for name, state in pattern.flow.states.items():
            inputs[name] = zeros(name, state.datatype, state.shape)
        return InferRequest(pattern.model_name, inputs=inputs, batch_size=pattern.batch_size)

    def absorb(self, sequence: SequenceRun, request: InferRequest, response: InferResponse) -> None:
        """Keeps the states that the answer brought, and takes out what no client sees."""
        if self.states and response.outputs:
            sequence.states = self.states.after(sequence.states, response.outputs)
            response.outputs = self.states.client_outputs(response.outputs, request.requested_outputs)
