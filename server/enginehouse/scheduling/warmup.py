"""Synthetic requests that every instance runs before its version is ready.

A sample of batch size N is N requests of one row that run together, `count` times. What the model answers
is dropped, but a version that answers with an error doesn't become ready, nor one that a sample doesn't fit.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from enginehouse.config.schema import ModelConfig, ModelWarmup
from enginehouse.errors import EnginehouseError, Internal, InvalidArgument
from enginehouse.execution.contract import Batch, ExecutionTimes, InstanceHandle
from enginehouse.scheduling.clock import Clock, LoopClock
from enginehouse.scheduling.contract import ExecutionObserver
from enginehouse.scheduling.sequence_controls import SequenceControls
from enginehouse.scheduling.sequence_state import SequenceStates, zeros
from enginehouse.types import Array, DataType, InferRequest, InferResponse, Tensor

CheckRequest = Callable[[InferRequest], None]
"""The core's checks: sets the batch size, raises InvalidArgument."""

_NO_ID = "[request id: <id_unknown>] "

RANDOM_INTEGERS_BELOW = 128
"""Fits every type, and the vocabulary of any model."""


async def warm_up(
    config: ModelConfig,
    model_directory: Path,
    instances: Sequence[InstanceHandle],
    observer: ExecutionObserver,
    check: CheckRequest,
    clock: Clock | None = None,
) -> None:
    """Runs the config's samples on every instance.

    Raises InvalidArgument for a sample that can't be right or that the model fails, Internal for an unreadable file.
    """
    samples = [(sample, warmup_requests(config, sample, model_directory, check)) for sample in config.model_warmup]
    time = clock or LoopClock()
    runs = (_warm_instance(samples, one, observer, time) for one in instances)
    # none is left running when another fails
    for outcome in await asyncio.gather(*runs, return_exceptions=True):
        if outcome is not None:
            raise outcome


def warmup_requests(
    config: ModelConfig, sample: ModelWarmup, model_directory: Path, check: CheckRequest
) -> list[InferRequest]:
    """The requests of one batch of the sample, checked, with all that the model sees."""
    if sample.batch_size > max(config.max_batch_size, 1):
        raise _failed(
            sample, [f"batch size {sample.batch_size} for '{config.name}', max allowed is {config.max_batch_size}"]
        )
    # Triton leaves out what the model doesn't take; what is then missing is the complaint.
    known = {spec.name for spec in config.input}
    requests = []
    for _ in range(sample.batch_size):
        inputs = {
            name: warmup_tensor(name, spec, config.max_batch_size > 0, model_directory)
            for name, spec in sample.inputs.items()
            if name in known
        }
        request = InferRequest(config.name, inputs=inputs)
        check(request)
        if config.HasField("sequence_batching"):
            _add_sequence_inputs(config, sample, request, model_directory)
        requests.append(request)
    return requests


def _add_sequence_inputs(
    config: ModelConfig, sample: ModelWarmup, request: InferRequest, model_directory: Path
) -> None:
    """A sequence of one request, but for what the sample sets itself."""
    own = set(request.inputs)
    request.correlation_id, request.sequence_start, request.sequence_end = 1, True, True
    for tensor in SequenceControls(config).tensors(1, start=True, end=True):
        request.inputs[tensor.name] = tensor
    request.inputs.update(SequenceStates(config, model_directory).initial())
    for name in (request.inputs.keys() - own) & sample.inputs.keys():
        request.inputs[name] = warmup_tensor(name, sample.inputs[name], config.max_batch_size > 0, model_directory)


def warmup_tensor(name: str, spec: ModelWarmup.Input, batching: bool, model_directory: Path) -> Tensor:
    """Zeros, random values, or what a file in the model's `warmup` folder holds. One row for batching models."""
    if any(dim < 0 for dim in spec.dims):
        raise InvalidArgument(f"warmup setting expects all variable-size dimensions are specified for input '{name}'")
    datatype = DataType.from_proto(spec.data_type)
    shape = (1, *spec.dims) if batching else tuple(spec.dims)
    source = spec.WhichOneof("input_data_type")
    if source == "zero_data":
        return zeros(name, datatype, shape)
    if source == "random_data":
        return random_tensor(name, datatype, shape)
    if source == "input_data_file":
        return _file_tensor(name, datatype, shape, model_directory / "warmup" / spec.input_data_file)
    raise InvalidArgument(f"{_NO_ID}warmup setting expects input '{name}' to have input_data_type set")


def random_tensor(name: str, datatype: DataType, shape: tuple[int, ...]) -> Tensor:
    random = np.random.default_rng()
    if datatype is DataType.BYTES:
        digits = [str(number) for number in random.integers(0, 10, math.prod(shape))]
        return Tensor.from_numpy(name, np.array(digits, dtype=object).reshape(shape))
    if datatype is DataType.BF16:
        values: Array = (random.random(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    elif datatype.numpy.kind == "f":
        values = random.random(shape).astype(datatype.numpy)
    elif datatype is DataType.BOOL:
        values = random.integers(0, 2, shape).astype(np.bool_)
    else:
        values = random.integers(0, RANDOM_INTEGERS_BELOW, shape).astype(datatype.numpy)
    return Tensor.from_numpy(name, values, datatype)


def _file_tensor(name: str, datatype: DataType, shape: tuple[int, ...], path: Path) -> Tensor:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Internal(f"failed to open text file for read {path}: {error.strerror}") from error
    size = math.prod(shape) * datatype.item_size
    if datatype is not DataType.BYTES:
        if len(data) < size:
            raise InvalidArgument(
                f"{_NO_ID}warmup setting expects {size} bytes, but the data provided from {path.name}only has "
                f"{len(data)} bytes"
            )
        data = data[:size]
    return Tensor(name, datatype, shape, memoryview(data))


async def _warm_instance(
    samples: Sequence[tuple[ModelWarmup, Sequence[InferRequest]]],
    instance: InstanceHandle,
    observer: ExecutionObserver,
    clock: Clock,
) -> None:
    for sample, requests in samples:
        for _ in range(sample.count or 1):
            if requests:
                problems = await _run_together(requests, instance, observer, clock)
                if problems:
                    raise _failed(sample, problems)


def _failed(sample: ModelWarmup, problems: Sequence[str]) -> InvalidArgument:
    listed = "".join(f"{problem}; " for problem in problems)
    return InvalidArgument(f"failed to run warmup sample '{sample.name}': {listed}")


async def _run_together(
    patterns: Sequence[InferRequest], instance: InstanceHandle, observer: ExecutionObserver, clock: Clock
) -> list[str]:
    """Returns when the instance is free and every request has its final answer: what went wrong."""
    problems: list[str] = []
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    now_ns = clock.now_ns()
    requests = [_fresh(pattern, now_ns) for pattern in patterns]
    num_expected = len(requests) + 1

    def count_down() -> None:
        nonlocal num_expected
        num_expected -= 1
        if not num_expected:
            finished.set_result(None)

    def on_response(request: InferRequest, response: InferResponse) -> None:
        if response.error is not None:
            problems.append(str(response.error))
        observer.on_response(request, response)
        request.num_responses += response.has_response
        if response.final:
            count_down()

    def on_done(batch: Batch, times: ExecutionTimes, error: EnginehouseError | None) -> None:
        observer.on_batch(batch.requests, instance, times, error)
        count_down()

    instance.execute(Batch(requests, on_response, on_done, lambda request: count_down(), instance=instance))
    await finished
    return problems


def _fresh(pattern: InferRequest, now_ns: int) -> InferRequest:
    """A request of its own with the same content."""
    request = InferRequest(
        pattern.model_name,
        inputs=dict(pattern.inputs),
        batch_size=pattern.batch_size,
        correlation_id=pattern.correlation_id,
        sequence_start=pattern.sequence_start,
        sequence_end=pattern.sequence_end,
    )
    request.times.received_ns = request.times.queued_ns = request.times.started_ns = now_ns
    return request
