"""Runs a batch on an instance, in whatever thread or process this is: the part that all hosts share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from enginehouse.backend import RequestInstance, TensorInstance
from enginehouse.errors import EnginehouseError, FailureReason, Internal
from enginehouse.types import InferRequest, InferResponse, RequestTimes, Tensor

Respond: TypeAlias = Callable[[int, InferResponse], None]
"""Takes the answers of the batch's requests, by their place in the batch."""


Nanoseconds: TypeAlias = tuple[int, int, int, int]
"""The fields of ExecutionTimes."""


@dataclass(slots=True)
class Outcome:
    """How a batch ended for its instance."""

    times: Nanoseconds
    outputs: Mapping[str, Tensor]
    error: EnginehouseError | None = None


def run_tensors(
    instance: TensorInstance, start_ns: int, inputs: Mapping[str, Tensor], outputs: Sequence[str]
) -> Outcome:
    """Never raises: whatever the instance raises is the outcome's error."""
    input_end_ns = time.monotonic_ns()
    try:
        results: Mapping[str, Tensor] = instance.run(inputs, outputs)
        error = None
    except Exception as problem:
        results, error = {}, as_error(problem)
    end_ns = time.monotonic_ns()
    return Outcome((start_ns, input_end_ns, end_ns, end_ns), results, error)


def run_requests(instance: RequestInstance, start_ns: int, requests: Sequence[InferRequest]) -> Outcome:
    """Never raises. Answers go to the requests' sinks, possibly after this returns."""
    input_end_ns = time.monotonic_ns()
    try:
        instance.execute(requests)
        error = None
    except Exception as problem:
        error = as_error(problem)
    end_ns = time.monotonic_ns()
    return Outcome((start_ns, input_end_ns, end_ns, end_ns), {}, error)


def as_error(problem: BaseException) -> EnginehouseError:
    """What clients are told of an exception out of a backend: errors of the tree as they are."""
    if isinstance(problem, EnginehouseError):
        problem.reason = problem.reason or FailureReason.BACKEND
        return problem
    text = f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
    return Internal(text, reason=FailureReason.BACKEND)


def view_for_instance(
    request: InferRequest, index: int, inputs: dict[str, Tensor], outputs: Sequence[str], respond: Respond
) -> InferRequest:
    """The request as an instance gets it: the model's shapes, and answers that go to `respond`."""
    return InferRequest(
        request.model_name,
        request.model_version,
        request.id,
        inputs,
        outputs,
        request.parameters,
        request.correlation_id,
        request.sequence_start,
        request.sequence_end,
        request.priority,
        request.timeout_us,
        request.deadline_ns,
        request.tenant,
        None,
        lambda response: respond(index, response),
        request.batch_size,
        RequestTimes(),
        request.cancelled,
    )
