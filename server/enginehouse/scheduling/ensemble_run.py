"""One request going through an ensemble's graph.

A run holds the tensors that exist so far and submits every step whose inputs are there. Tensors are handed
over, never copied. Each answer of a decoupled step is a branch of its own: a tensor is kept under the path
of answers that led to it, and steps on longer paths see it too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError, FailureReason, InvalidArgument, error_of
from enginehouse.execution.contract import ExecutionTimes
from enginehouse.scheduling.ensemble_graph import Step
from enginehouse.scheduling.in_flight import cancelled
from enginehouse.types import CorrelationId, InferRequest, InferResponse, ParameterValue, Tensor

if TYPE_CHECKING:
    from enginehouse.scheduling.ensemble import EnsembleScheduler

Path: TypeAlias = tuple[int, ...]
"""Which answers of decoupled steps led to a tensor: () for none, (2,) for the third answer of one."""


@dataclass(frozen=True, slots=True)
class Sequencing:
    """The sequence flags that a tensor carries on to the steps that read it."""

    correlation_id: CorrelationId
    start: bool
    end: bool


@dataclass(slots=True)
class Value:
    """A tensor of the run; `tensor` is None where an optional one is missing."""

    tensor: Tensor | None
    batch_size: int
    sequencing: Sequencing | None
    num_readers: int


class StepGate:
    """At most `limit` (0: any number) requests of each step at once, over all runs; the others wait."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_inside: dict[int, int] = {}
        self._waiting: dict[int, deque[Callable[[], bool]]] = {}

    def enter(self, step: Step, go: Callable[[], bool]) -> None:
        """Calls `go` now or when there is room. If it returns true, `leave` is to follow."""
        if not self._limit:
            go()
        elif self._num_inside.get(step.index, 0) >= self._limit:
            self._waiting.setdefault(step.index, deque()).append(go)
        elif go():
            self._num_inside[step.index] = self._num_inside.get(step.index, 0) + 1

    def leave(self, step: Step) -> None:
        if not self._limit:
            return
        waiting = self._waiting.get(step.index)
        while waiting:
            if waiting.popleft()():
                return
        self._num_inside[step.index] -= 1


class EnsembleRun:
    """See module. `scheduler.deliver` gets the answers, one of them final."""

    def __init__(self, scheduler: EnsembleScheduler, request: InferRequest) -> None:
        self.request = request
        self._scheduler = scheduler
        self._graph = scheduler.graph
        self._outputs = frozenset(request.requested_outputs or self._graph.outputs)
        self._needed = self._graph.needed_steps(self._outputs)
        self._values: dict[str, dict[Path, Value]] = {}
        self._running: set[InferRequest] = set()
        self._num_unfinished = 0
        """Steps that are submitted or wait at the gate."""
        self._is_over = False
        self._has_answered = False
        self._durations_ns = [0, 0, 0]

    # --- the run

    def start(self) -> None:
        request = self.request
        request.on_cancel = self._on_cancel
        for name in self._graph.inputs:
            self._put(name, (), request.inputs.get(name), request.batch_size, None)
        self._advance(self._graph.inputs, ())
        if not self._num_unfinished:
            self._scheduler.clock.call_soon(self._end)

    def fail(self, error: EnginehouseError) -> None:
        """Ends the run with this error; steps that are under way are told and their answers dropped."""
        if self._is_over:
            return
        self._is_over = True
        for step_request in list(self._running):
            step_request.cancel()
        self._scheduler.deliver(self, InferResponse(error=error))

    def times(self) -> ExecutionTimes:
        """The steps' times added up, as if they had run one after the other."""
        times = self.request.times
        times.compute_input_end_ns = times.started_ns + self._durations_ns[0]
        times.compute_output_start_ns = times.compute_input_end_ns + self._durations_ns[1]
        return ExecutionTimes(
            times.started_ns,
            times.compute_input_end_ns,
            times.compute_output_start_ns,
            times.compute_output_start_ns + self._durations_ns[2],
        )

    def _on_cancel(self, request: InferRequest) -> None:
        self.fail(cancelled())

    def _fail_in_step(self, error: EnginehouseError) -> None:
        text = f"in ensemble '{self._graph.name}', {error}"
        self.fail(error_of(error.code, text, error.reason or FailureReason.OTHER))

    def _advance(self, updated: Iterable[str], branch: Path) -> None:
        """Starts the steps and sends the answer that the new tensors make possible."""
        steps = {
            step.index: step
            for name in updated
            for step in self._graph.consumers.get(name, ())
            if step.index in self._needed
        }
        for step in steps.values():
            for path in self._ready_paths(step.inputs.values(), branch):
                self._start_step(step, path)
        if any(name in self._outputs for name in updated):
            for path in self._ready_paths(self._outputs, branch):
                self._answer(path)

    def _answer(self, path: Path) -> None:
        outputs: list[Tensor] = []
        sequencing: Sequencing | None = None
        for name in self._graph.outputs:
            value = self._read(name, path) if name in self._outputs else None
            if value is not None and value.tensor is not None:
                dims = self._scheduler.output_dims[name]
                outputs.append(fit_output(value, name, dims, self.request.batch_size))
                sequencing = value.sequencing or sequencing
        self._has_answered = True
        self._is_over = not self._num_unfinished
        self._scheduler.deliver(
            self,
            InferResponse(
                outputs,
                final=self._is_over,
                parameters=_sequence_parameters(sequencing),
                model_name=self._graph.name,
                model_version=self._scheduler.version,
                id=self.request.id,
            ),
        )

    def _end(self) -> None:
        """No step is under way and no answer was the final one."""
        if self._is_over:
            return
        if self._has_answered or self._scheduler.is_decoupled:
            self._is_over = True
            self._scheduler.deliver(self, InferResponse(has_response=False))
            return
        prefix = f"[request id: {self.request.id or '<id_unknown>'}] "
        self._fail_in_step(
            InvalidArgument(
                f"{prefix}unexpected deadlock, at least one output is not set while no more ensemble steps can be made"
            )
        )

    # --- tensors

    def _put(
        self, name: str, path: Path, tensor: Tensor | None, batch_size: int, sequencing: Sequencing | None
    ) -> None:
        readers = sum(step.index in self._needed for step in self._graph.consumers.get(name, ()))
        value = Value(tensor, batch_size, sequencing, readers + (name in self._outputs))
        self._values.setdefault(name, {})[path] = value

    def _visible(self, name: str, path: Path) -> Path | None:
        """The longest path up to `path` under which the tensor exists."""
        values = self._values.get(name)
        if values is not None:
            for length in range(len(path), -1, -1):
                if path[:length] in values:
                    return path[:length]
        return None

    def _ready_paths(self, names: Iterable[str], branch: Path) -> list[Path]:
        """The paths on which all of these tensors exist now that there is something new on `branch`."""
        names = tuple(names)
        candidates = {branch}
        for name in names:
            candidates.update(path for path in self._values.get(name, ()) if path[: len(branch)] == branch)
        ready = []
        for path in sorted(candidates):
            found = [self._visible(name, path) for name in names]
            if all(visible is not None for visible in found) and path in found:
                ready.append(path)
        return ready

    def _read(self, name: str, path: Path) -> Value:
        """The tensor as a reader on `path` sees it; forgotten after its last reader."""
        where = self._visible(name, path)
        assert where is not None, "bug: readers wait until all tensors are there"
        value = self._values[name][where]
        if where == path and path:
            value.num_readers -= 1
            if not value.num_readers:
                del self._values[name][where]
        return value

    def _is_read(self, name: str) -> bool:
        return name in self._outputs or any(step.index in self._needed for step in self._graph.consumers.get(name, ()))

    # --- steps

    def _start_step(self, step: Step, path: Path) -> None:
        self._num_unfinished += 1
        values = {name: self._read(tensor, path) for name, tensor in step.inputs.items()}
        self._scheduler.gate.enter(step, lambda: self._submit_step(step, path, values))

    def _submit_step(self, step: Step, path: Path, values: Mapping[str, Value]) -> bool:
        """False if the run is over and the step need not run."""
        if self._is_over:
            self._num_unfinished -= 1
            return False
        answers = _StepAnswers(self, step, path)
        try:
            answers.request = self._step_request(step, values, answers)
            self._running.add(answers.request)
            self._scheduler.submit_step(answers.request)
        except EnginehouseError as error:
            # later: nobody expects the answer before `submit` has returned
            refusal = InferResponse(error=error)
            self._scheduler.clock.call_soon(lambda: self.on_step_response(answers, path, refusal))
        return True

    def _step_request(self, step: Step, values: Mapping[str, Value], answers: _StepAnswers) -> InferRequest:
        request = self.request
        member = self._scheduler.lookup(step.model_name, step.model_version)
        sequencing = Sequencing(request.correlation_id, request.sequence_start, request.sequence_end)
        inputs: dict[str, Tensor] = {}
        for name, value in values.items():
            if value.tensor is not None:
                inputs[name] = fit_input(value, name, member)
            sequencing = value.sequencing or sequencing
        return InferRequest(
            model_name=step.model_name,
            model_version=step.model_version,
            id=request.id,
            inputs=inputs,
            requested_outputs=[name for name, tensor in step.outputs.items() if self._is_read(tensor)],
            parameters=dict(request.parameters),
            correlation_id=sequencing.correlation_id,
            sequence_start=sequencing.start,
            sequence_end=sequencing.end,
            priority=request.priority,
            timeout_us=request.timeout_us,
            deadline_ns=request.deadline_ns,
            tenant=request.tenant,
            trace=request.trace.child() if request.trace is not None else None,
            sink=answers,
        )

    def on_step_response(self, answers: _StepAnswers, branch: Path, response: InferResponse) -> None:
        step = answers.step
        if response.final:
            self._running.discard(answers.request)
            self._num_unfinished -= 1
            self._add_durations(answers.request)
            self._scheduler.gate.leave(step)
        if self._is_over:
            return
        if response.error is not None:
            self._fail_in_step(response.error)
            return
        if response.has_response:
            sequencing = _sequencing_after(answers.request, response.parameters)
            given = {output.name: output for output in response.outputs}
            updated = {tensor: given.get(name) for name, tensor in step.outputs.items()}
            for name, tensor in updated.items():
                self._put(name, branch, tensor, answers.request.batch_size, sequencing)
            self._advance(updated, branch)
        if not self._num_unfinished:
            self._end()

    def _add_durations(self, request: InferRequest) -> None:
        times = request.times
        if times.ended_ns and times.compute_output_start_ns and times.started_ns:
            self._durations_ns[0] += times.compute_input_end_ns - times.started_ns
            self._durations_ns[1] += times.compute_output_start_ns - times.compute_input_end_ns
            self._durations_ns[2] += times.ended_ns - times.compute_output_start_ns


class _StepAnswers:
    """The sink of one step's request."""

    __slots__ = ("_num_answers", "_path", "_run", "request", "step")

    def __init__(self, run: EnsembleRun, step: Step, path: Path) -> None:
        self.step = step
        self.request = run.request
        self._run = run
        self._path = path
        self._num_answers = 0

    def __call__(self, response: InferResponse) -> None:
        # a single answer opens no branch of its own
        branch = self._path if response.final and not self._num_answers else (*self._path, self._num_answers)
        self._num_answers += 1
        self._run.on_step_response(self, branch, response)


def _sequencing_after(request: InferRequest, parameters: Mapping[str, ParameterValue]) -> Sequencing:
    """What the answer says of its sequence, else what its request said."""
    if not parameters.keys() & {"sequence_id", "sequence_start", "sequence_end"}:
        return Sequencing(request.correlation_id, request.sequence_start, request.sequence_end)
    correlation_id = parameters.get("sequence_id", request.correlation_id)
    if isinstance(correlation_id, bool | float):
        raise InvalidArgument(
            "expected parameter 'sequence_id' to be TRITONSERVER_PARAMETER_INT or TRITONSERVER_PARAMETER_STRING"
        )
    return Sequencing(correlation_id, bool(parameters.get("sequence_start")), bool(parameters.get("sequence_end")))


def _sequence_parameters(sequencing: Sequencing | None) -> dict[str, ParameterValue]:
    if sequencing is None:
        return {}
    correlation_id = sequencing.correlation_id
    if isinstance(correlation_id, int) and correlation_id >= 2**63:
        correlation_id -= 2**64  # the wire's parameter is a signed number
    return {
        "sequence_id": correlation_id,
        "sequence_start": sequencing.start,
        "sequence_end": sequencing.end,
    }


def fit_input(value: Value, name: str, member: ModelConfig) -> Tensor:
    """The tensor under the step's name, with or without the batch axis as the step's model wants it."""
    tensor = value.tensor
    assert tensor is not None, "bug: only tensors that exist are passed on"
    shape = tensor.shape
    if (member.max_batch_size > 0) != (value.batch_size > 0):
        dims = next((tuple(spec.dims) for spec in member.input if spec.name == name), ())
        shape = fit_shape(shape, dims, member.max_batch_size > 0, value.batch_size)
    return Tensor(name, tensor.datatype, shape, tensor.data)


def fit_output(value: Value, name: str, dims: tuple[int, ...], batch_size: int) -> Tensor:
    """The tensor as the ensemble's client wants it."""
    tensor = value.tensor
    assert tensor is not None, "bug: only tensors that exist are answered"
    shape = tensor.shape
    if (batch_size > 0) != (value.batch_size > 0):
        shape = fit_shape(shape, dims, batch_size > 0, value.batch_size)
    return Tensor(name, tensor.datatype, shape, tensor.data)


def fit_shape(shape: tuple[int, ...], dims: tuple[int, ...], batching: bool, rows: int) -> tuple[int, ...]:
    """`shape` for a reader whose dims (without batch axis) are these.

    A batching reader gets a batch axis of 1 in front unless there is one; for another one the batch axis is
    an ordinary axis if that fits, and is dropped if it is 1.
    """
    matches = len(shape) == len(dims) and all(d in (-1, size) for d, size in zip(dims, shape, strict=True))
    if batching:
        return (1, *shape) if matches else shape
    return shape[1:] if not matches and rows == 1 else shape
