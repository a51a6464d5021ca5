"""Requests, answers and tensors as messages name them: written into a block here, views of a block there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from enginehouse.errors import Internal
from enginehouse.execution.messages import ErrorRef, RequestRef, ResponseRef, TensorRef
from enginehouse.types import VALID_TYPES, DataType, InferRequest, InferResponse, RequestTimes, Tensor

_TYPES = [DataType.BOOL, *sorted(VALID_TYPES, key=lambda datatype: datatype.proto)]
"""By their number in the proto; 0 is none."""
_NUM_TYPES = len(_TYPES)


def tensors_bytes(tensors: Iterable[Tensor]) -> int:
    """What they take in a block."""
    total = 0
    for tensor in tensors:
        total += (tensor.data.nbytes + 63) & -64
    return total


def write_tensors(tensors: Collection[Tensor], memory: memoryview, offset: int = 0) -> tuple[list[TensorRef], int]:
    """Copies the tensors into a block's memory; where they are, and where the next may start."""
    refs = []
    for tensor in tensors:
        data = tensor.data
        if type(data) is not memoryview:
            data = tensor.host_data()
        nbytes = data.nbytes
        if nbytes:
            memory[offset : offset + nbytes] = data
        refs.append(TensorRef(tensor.name, tensor.datatype.proto, tensor.shape, offset, nbytes))
        offset += (nbytes + 63) & -64
    return refs, offset


def datatype_of(ref: TensorRef) -> DataType:
    """Raises Internal if the other side names a type that there is none of."""
    if not 0 < ref.datatype < _NUM_TYPES:
        raise Internal(f"tensor '{ref.name}' is said to have type {ref.datatype}")
    return _TYPES[ref.datatype]


def tensor_of(ref: TensorRef, memory: memoryview) -> Tensor:
    """A view of the block. Raises Internal if the other side names bytes outside of it."""
    offset, nbytes = ref.offset, ref.nbytes
    end = offset + nbytes
    if not (0 < ref.datatype < _NUM_TYPES and 0 <= offset <= end and (end <= memory.nbytes or not nbytes)):
        raise Internal(f"tensor '{ref.name}' is said to lie outside of its block")
    return Tensor(ref.name, _TYPES[ref.datatype], ref.shape, memory[offset:end])


def request_ref(request: InferRequest, inputs: list[TensorRef]) -> RequestRef:
    return RequestRef(
        request.id,
        inputs,
        list(request.requested_outputs),
        request.parameters,
        request.correlation_id,
        (1 if request.sequence_start else 0) | (2 if request.sequence_end else 0),
        request.priority,
        request.timeout_us,
        request.deadline_ns,
        request.tenant,
        request.batch_size,
        request.model_name,
        request.model_version,
        request.trace.traceparent if hasattr(request.trace, "traceparent") else "",
        request.max_ahead,
    )


_NO_TIMES = RequestTimes()
"""Of requests in a worker: there nobody takes them."""


def request_of(ref: RequestRef, memory: memoryview) -> InferRequest:
    """Its tensors are views of the block; the sink is the caller's to set; `trace` is the W3C context alone."""
    return InferRequest(
        ref.model_name,
        ref.model_version,
        ref.id,
        {tensor.name: tensor_of(tensor, memory) for tensor in ref.inputs},
        ref.outputs,
        ref.parameters,
        ref.correlation_id,
        ref.flags & 1 != 0,
        ref.flags & 2 != 0,
        ref.priority,
        ref.timeout_us,
        ref.deadline_ns,
        ref.tenant,
        ref.traceparent or None,
        None,
        ref.batch_size,
        _NO_TIMES,
    )


def response_ref(index: int, response: InferResponse, outputs: list[TensorRef]) -> ResponseRef:
    return ResponseRef(
        index,
        outputs,
        ErrorRef.of(response.error) if response.error is not None else None,
        response.final,
        response.has_response,
        _plain(response.parameters),
        response.model_name,
        response.model_version,
        response.reschedule,
    )


def response_of(ref: ResponseRef, memory: memoryview, request_id: str) -> InferResponse:
    return InferResponse(
        [tensor_of(tensor, memory) for tensor in ref.outputs],
        ref.error.error() if ref.error is not None else None,
        ref.final,
        ref.parameters,
        ref.model_name,
        ref.model_version,
        request_id,
        ref.has_response,
        ref.reschedule,
    )


def _plain(parameters: Mapping[str, bool | int | float | str]) -> dict[str, bool | int | float | str]:
    return parameters if isinstance(parameters, dict) else dict(parameters)
