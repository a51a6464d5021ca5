"""One request going through an ensemble's graph.

A run holds the tensors that exist so far and submits every step whose inputs are there and whose condition
holds. Tensors are handed over, never copied.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from enginehouse.errors import EnginehouseError, FailureReason, InvalidArgument, error_of
from enginehouse.execution.contract import ExecutionTimes
from enginehouse.scheduling.ensemble_graph import Step
from enginehouse.scheduling.ensemble_handover import kept_outputs
from enginehouse.scheduling.ensemble_tensors import Path, RunTensors, Sequencing, Value, fit_input, fit_output
from enginehouse.scheduling.in_flight import cancelled
from enginehouse.scheduling.step_gate import Hold
from enginehouse.types import InferRequest, InferResponse, ParameterValue, Tensor

if TYPE_CHECKING:
    from enginehouse.scheduling.ensemble import EnsembleScheduler


class EnsembleRun:
    """See module. `scheduler.deliver` gets the answers, one of them final."""

    def __init__(self, scheduler: EnsembleScheduler, request: InferRequest) -> None:
        self.request = request
        self._scheduler = scheduler
        self._graph = scheduler.graph
        self._plan = self._graph.plan(request.requested_outputs)
        self._tensors = RunTensors(self._plan)
        self._running: set[InferRequest] = set()
        self._num_unfinished = 0
        """Steps that are submitted or wait at the gate."""
        self._untaken: deque[Hold] = deque()
        """Of the answers that were given and not yet taken, where the request limits how many there may be."""
        self._is_over = False
        self._has_answered = False
        self._durations_ns = [0, 0, 0]
        self._skips: dict[tuple[str, Path], int] = {}
        """How many of the steps that make a tensor did not run."""
        self._step_times: list[dict[str, object]] | None = [] if _wants_step_times(request) else None

    # --- the run

    def start(self) -> None:
        request = self.request
        request.on_cancel = self._on_cancel
        request.on_taken = self._on_taken
        for name in self._graph.inputs:
            self._tensors.put(name, (), Value(request.inputs.get(name), request.batch_size))
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

    def drop_tensors(self) -> None:
        """After the final answer: tensors on a device must not wait until nobody knows the run any more."""
        self._tensors = RunTensors(self._plan)

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

    def let_go(self) -> None:
        """Nobody need wait for what the run still holds: it has ended."""
        while self._untaken:
            self._untaken.popleft().release()

    def _on_cancel(self, request: InferRequest) -> None:
        self.fail(cancelled())

    def _on_taken(self, request: InferRequest) -> None:
        if self._untaken:
            self._untaken.popleft().release()

    def _fail_in_step(self, error: EnginehouseError) -> None:
        text = f"in ensemble '{self._graph.name}', {error}"
        self.fail(error_of(error.code, text, error.reason or FailureReason.OTHER))

    def _advance(self, updated: Iterable[str], branch: Path, hold: Hold | None = None) -> None:
        """Starts the steps and sends the answer that the new tensors make possible; `hold` waits for them."""
        consumers, outputs = self._plan.consumers, self._plan.outputs
        steps = {step.index: step for name in updated for step in consumers.get(name, ())}
        for step in steps.values():
            for path in self._tensors.ready_paths(step.reads, branch):
                self._start_step(step, path, hold)
        if any(name in outputs for name in updated):
            paths = self._tensors.ready_paths(outputs, branch)
            for num_left, path in zip(reversed(range(len(paths))), paths, strict=True):
                self._answer(path, hold, num_left)

    def _answer(self, path: Path, hold: Hold | None, num_left: int) -> None:
        """`num_left` more are to be sent at once."""
        outputs: list[Tensor] = []
        sequencing: Sequencing | None = None
        for name in self._plan.outputs:
            value = self._tensors.read(name, path)
            if value.tensor is not None:
                dims = self._scheduler.output_dims[name]
                outputs.append(fit_output(value, name, dims, self.request.batch_size))
                sequencing = value.sequencing or sequencing
        self._has_answered = True
        self._is_over = not self._num_unfinished and not num_left
        if hold is not None and self.request.max_ahead and not self._is_over:
            hold.wait_for_one_more()
            self._untaken.append(hold)
        self._scheduler.deliver(
            self,
            InferResponse(
                outputs,
                final=self._is_over,
                parameters=self._parameters(sequencing),
                model_name=self._graph.name,
                model_version=self._scheduler.version,
                id=self.request.id,
            ),
        )

    def _parameters(self, sequencing: Sequencing | None) -> dict[str, ParameterValue]:
        parameters = _sequence_parameters(sequencing)
        if self._step_times is not None:
            parameters["step_times"] = json.dumps(self._step_times)
        return parameters

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

    # --- steps

    def _start_step(self, step: Step, path: Path, hold: Hold | None) -> None:
        self._num_unfinished += 1
        if hold is not None:
            hold.wait_for_one_more()
        read = {tensor: self._tensors.read(tensor, path) for tensor in step.reads}
        try:
            runs = self._runs(step, read)
        except InvalidArgument as error:
            self._scheduler.clock.call_soon(partial(self._fail_at_start, error, hold))
            return
        if not runs:
            # later: nobody expects the answer before `submit` has returned
            self._scheduler.clock.call_soon(lambda: self._skip(step, path, hold))
            return
        values = {name: read[tensor] for name, tensor in step.inputs.items()}
        self._scheduler.gate.enter(step.index, lambda: self._submit_step(step, path, values, hold))

    def _fail_at_start(self, error: EnginehouseError, hold: Hold | None) -> None:
        self._fail_in_step(error)
        _release(hold)

    def _runs(self, step: Step, read: Mapping[str, Value]) -> bool:
        """Whether its condition holds and no tensor that it must have was skipped."""
        if step.condition is not None:
            tensors = {name: value.tensor for name, value in read.items()}
            if not step.condition.holds(tensors, self.request.parameters):
                return False
        skipped = {name for name, tensor in step.inputs.items() if read[tensor].is_skipped}
        if not skipped:
            return True
        member = self._scheduler.lookup(step.model_name, step.model_version)
        return skipped <= {spec.name for spec in member.input if spec.optional}

    def _skip(self, step: Step, path: Path, hold: Hold | None) -> None:
        self._num_unfinished -= 1
        if not self._is_over:
            self._make_nothing(step, path, hold)
        _release(hold)

    def _make_nothing(self, step: Step, path: Path, hold: Hold | None) -> None:
        missing = []
        for name in step.outputs.values():
            skips = self._skips[name, path] = self._skips.get((name, path), 0) + 1
            if skips == len(self._graph.producers[name]):
                self._tensors.put(name, path, Value(None, is_skipped=True))
                missing.append(name)
        self._advance(missing, path, hold)
        if not self._num_unfinished:
            self._end()

    def _submit_step(self, step: Step, path: Path, values: Mapping[str, Value], hold: Hold | None) -> bool:
        """False if the run is over and the step need not run."""
        _release(hold)
        if self._is_over:
            self._num_unfinished -= 1
            return False
        answers = _StepAnswers(self, step, path, partial(self._scheduler.gate.leave, step.index))
        try:
            answers.request = self._step_request(step, values, answers)
            self._running.add(answers.request)
            self._scheduler.submit_step(answers.request)
        except EnginehouseError as error:
            # later: nobody expects the answer before `submit` has returned
            # and without its traceback, whose frames know the tensors and the refusal
            refusal = InferResponse(error=error.with_traceback(None))
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
            requested_outputs=self._plan.requested[step.index],
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
            max_ahead=self._scheduler.max_ahead(step, member) if self._is_limited else 0,
            kept_outputs=self._kept_outputs(step),
        )

    def _kept_outputs(self, step: Step) -> frozenset[str]:
        """Nothing while the request is traced: a trace may show what goes from step to step."""
        hands_over = self._scheduler.hands_over
        if hands_over is None or self.request.trace is not None:
            return frozenset()
        return kept_outputs(step, self._plan, hands_over)

    def on_step_response(self, answers: _StepAnswers, branch: Path, response: InferResponse) -> None:
        hold = answers.hold_for(response) if self._is_limited else None
        if response.final:
            if self._scheduler.hands_over is not None:
                answers.drop_tensors()
            self._running.discard(answers.request)
            self._note_times(answers.step, answers.request)
            self._num_unfinished -= 1
            self._add_durations(answers.request)
        if not self._is_over:
            self._take(answers, branch, response, hold)
        _release(hold)

    @property
    def _is_limited(self) -> bool:
        return bool(self._scheduler.gate.limit or self.request.max_ahead)

    def _take(self, answers: _StepAnswers, branch: Path, response: InferResponse, hold: Hold | None) -> None:
        if response.error is not None:
            self._fail_in_step(response.error)
            return
        if response.has_response:
            step = answers.step
            sequencing = _sequencing_after(answers.request, response.parameters)
            given = {output.name: output for output in response.outputs}
            updated = {tensor: given.get(name) for name, tensor in step.outputs.items()}
            for name, tensor in updated.items():
                if len(self._graph.producers[name]) > 1 and self._tensors.is_made(name, branch):
                    self._fail_in_step(InvalidArgument(f"more than one step made the ensemble tensor '{name}'"))
                    return
                self._tensors.put(name, branch, Value(tensor, answers.request.batch_size, sequencing))
            self._advance(updated, branch, hold)
        if not self._num_unfinished:
            self._end()

    def _note_times(self, step: Step, request: InferRequest) -> None:
        """For a client that asked for them, in the order in which the steps ended."""
        if self._step_times is None:
            return
        times = request.times
        started_ns = times.started_ns or times.queued_ns
        self._step_times.append(
            {
                "step": step.index,
                "model": step.model_name,
                "queue_us": (started_ns - times.queued_ns) // 1000,
                "compute_us": max(times.ended_ns - started_ns, 0) // 1000,
                "total_us": (self._scheduler.clock.now_ns() - times.queued_ns) // 1000 if times.queued_ns else 0,
            }
        )

    def _add_durations(self, request: InferRequest) -> None:
        times = request.times
        if times.ended_ns and times.compute_output_start_ns and times.started_ns:
            self._durations_ns[0] += times.compute_input_end_ns - times.started_ns
            self._durations_ns[1] += times.compute_output_start_ns - times.compute_input_end_ns
            self._durations_ns[2] += times.ended_ns - times.compute_output_start_ns


class _StepAnswers:
    """The sink of one step's request."""

    __slots__ = ("_num_answers", "_path", "_place", "_run", "request", "step")

    def __init__(self, run: EnsembleRun, step: Step, path: Path, leave: Callable[[], None]) -> None:
        """`leave` gives the request's place at the gate back: when all that its answers lead to is under way."""
        self.step = step
        self.request = InferRequest(step.model_name)
        """The step's; this one stays if none can be made, because its model has gone."""
        self._place = Hold(leave)
        self._run = run
        self._path = path
        self._num_answers = 0

    def __call__(self, response: InferResponse) -> None:
        # a single answer opens no branch of its own
        branch = self._path if response.final and not self._num_answers else (*self._path, self._num_answers)
        self._num_answers += 1
        self._run.on_step_response(self, branch, response)

    def drop_tensors(self) -> None:
        """After the final answer: the request knows this sink, and errors know the frames that they went through."""
        self.request.sink = None
        self.request.inputs = {}

    def hold_for(self, response: InferResponse) -> Hold:
        """Until all that the answer leads to is under way."""
        if response.final:
            return Hold(self._place.release)
        self._place.wait_for_one_more()
        return Hold(self._on_taken)

    def _on_taken(self) -> None:
        self.request.took_answer()
        self._place.release()


def _release(hold: Hold | None) -> None:
    if hold is not None:
        hold.release()


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


def _wants_step_times(request: InferRequest) -> bool:
    return request.parameters.get("step_times") in (True, "true", 1)


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
