"""One LLM inside the engine: plans, runs and answers a step of its generations. The engine's thread only.

Where the runner is asynchronous, step n + 1 is planned and started before step n is finished: its decoding reads
tokens that only the device knows. What ends with such a token (a stop token, a stop string) is noticed one step
late, and what that step computed for it is thrown away.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from enginehouse.errors import DeadlineExceeded, EnginehouseError, Internal, ResourceExhausted, Unavailable
from enginehouse.types import FinishReason, TokenEvent
from enginehouse_backends.llm.answering import Answer
from enginehouse_backends.llm.generation import Generation, GenerationState
from enginehouse_backends.llm.metrics import LlmMetrics
from enginehouse_backends.llm.runner import FloatArray, Runner, RunningStep, StepInput, StepOutput
from enginehouse_backends.llm.scheduler import Scheduler, StepPlan
from enginehouse_backends.llm.step_building import BlockTable, build_step

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _StartedStep:
    """What a step was planned as, and the runner's word for it."""

    plan: StepPlan
    step: StepInput
    running: RunningStep
    started_ns: int


class ServedLlm:
    """See module. `emit` is called with all events of a step at once."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        runner: Runner,
        table: BlockTable,
        metrics: LlmMetrics,
        emit: Callable[[Sequence[TokenEvent]], None],
        max_waiting: int,
    ) -> None:
        self.name, self.scheduler, self.runner, self.metrics = name, scheduler, runner, metrics
        self.model_name = metrics.model_name
        self._table, self._emit, self.max_waiting = table, emit, max_waiting
        self.most_tokens = 0
        """What the model can always hold of one sequence. Read by other threads."""
        self._answers: dict[str, Answer] = {}
        self._deadlines: list[tuple[int, str]] = []
        self._events: list[TokenEvent] = []
        self._started: _StartedStep | None = None
        """Not finished yet. Between two calls of `step` only where the runner is asynchronous."""
        self._finished_ns = 0
        self.num_overlapped = 0
        """Steps that were started before their forerunner was finished."""

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._started is not None

    @property
    def num_open(self) -> int:
        return len(self._answers)

    # --- coming and going
    def add(self, answer: Answer) -> None:
        """Takes it on, or ends it at once with an error."""
        generation = answer.generation
        if generation.id in self._answers:
            self._send_now(answer.end(FinishReason.ERROR, Internal(f"the id '{generation.id}' is in use")))
            return
        if len(self.scheduler.waiting) >= self.max_waiting:
            self._send_now(answer.end(FinishReason.ERROR, self.full_queue()))
            return
        self._answers[generation.id] = answer
        if generation.deadline_ns:
            heapq.heappush(self._deadlines, (generation.deadline_ns, generation.id))
        self.scheduler.add(generation)

    def full_queue(self) -> Unavailable:
        """The refusal of one request more, counted."""
        self.metrics.num_rejections += 1
        return Unavailable(
            f"model '{self.model_name}' has {self.max_waiting} requests waiting: its queue is full"
        )

    def refuse(self, answer: Answer, error: EnginehouseError) -> None:
        """It isn't taken on."""
        self._send_now(answer.end(FinishReason.ERROR, error))

    def cancel(self, request_id: str) -> None:
        answer = self._answers.get(request_id)
        if answer is not None:
            self._end(answer, FinishReason.ABORT)
            self.flush()

    def fail_all(self, error: EnginehouseError) -> None:
        for answer in list(self._answers.values()):
            self._end(answer, FinishReason.ERROR, error)
        self.flush()

    # --- steps
    def step(self) -> StepPlan:
        """Starts a step, if there is anything to compute, and finishes the one before (its own, where the runner
        waits). The plan tells whether it is short of blocks; one that an unfinished step may yet free is not.
        """
        now_ns = time.monotonic_ns()
        self._expire(now_ns)
        before = self._started
        if before is not None and not before.running.may_overlap:
            self.settle()
            before = None
        plan = self.scheduler.plan(now_ns)
        self._started = self._start(plan, before, now_ns) if plan.shares else None
        if before is not None:
            self._finish_step(before)
            if self._started is None:
                plan.starved = None
                plan.waits_for_step = True
        if not self.runner.is_asynchronous:
            self.settle()
        self.flush()
        return plan

    def settle(self) -> None:
        """Finishes what was started, so that nothing runs: before blocks move, or memory goes."""
        started, self._started = self._started, None
        if started is not None:
            self._finish_step(started)

    def vacate(self) -> None:
        """Nobody holds a block any more; who ran waits, to be computed again."""
        self.settle()
        for generation in list(reversed(self.scheduler.running)):
            self.scheduler.preempt(generation)
        self.flush()

    def flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._emit(events)

    def starve(self, generation: Generation) -> None:
        """There will never be enough blocks for it."""
        have = self.scheduler.space.guaranteed_blocks(self.name)
        size = self.scheduler.limits.block_size
        error = ResourceExhausted(
            f"{len(generation.tokens)} tokens need {self.scheduler.blocks_for(generation.num_known)} KV blocks of "
            f"{size}, and model '{self.model_name}' can have {have}"
        )
        self._end(self._answers[generation.id], FinishReason.ERROR, error)
        self.flush()

    def _start(self, plan: StepPlan, before: _StartedStep | None, started_ns: int) -> _StartedStep | None:
        unseen = () if before is None else before.step.sampled
        try:
            step = build_step(plan, self._table, unseen, self.runner.pooling)
            running = self.runner.start(step)
        except Exception as error:
            self._fail_step(plan, error)
            return None
        for generation in step.sampled:
            generation.num_unseen += 1
        self.num_overlapped += before is not None
        return _StartedStep(plan, step, running, started_ns)

    def _finish_step(self, started: _StartedStep) -> None:
        plan, step = started.plan, started.step
        try:
            output = started.running.finish()
        except Exception as error:
            self._forget_unseen(step)
            self._fail_step(plan, error)
            self._fail_follower()
            return
        self._forget_unseen(step)
        now_ns = time.monotonic_ns()
        seconds = (now_ns - max(started.started_ns, self._finished_ns)) / 1e9
        self._finished_ns = now_ns
        self.scheduler.latency.observe(plan.num_decoding, plan.num_prompt_tokens, seconds)
        if output.vectors is not None:
            self._take_vectors(plan, output.vectors, now_ns)
        else:
            self._take_prompt_logprobs(plan, output)
            self._take_tokens(step, output, now_ns)
        self._count_step(plan)

    @staticmethod
    def _forget_unseen(step: StepInput) -> None:
        for generation in step.sampled:
            generation.num_unseen -= 1

    def _fail_follower(self) -> None:
        """A step that was started on top of a failed one has computed nonsense."""
        follower, self._started = self._started, None
        if follower is None:
            return
        try:
            follower.running.finish()
        except Exception as error:
            logger.error("the step after the failed one failed, too: %r", error)
        self._forget_unseen(follower.step)
        self._fail_step(follower.plan, Internal("the step before it failed"))

    def _take_tokens(self, step: StepInput, output: StepOutput, now_ns: int) -> None:
        logprobs = output.logprobs or (None,) * len(step.sampled)
        for generation, token_id, row in zip(step.sampled, output.token_ids, logprobs, strict=True):
            if generation.state is GenerationState.FINISHED:
                continue  # it ended while this step was under way
            answer = self._answers[generation.id]
            if token_id < 0:
                self.metrics.corrupted += 1
                error = Internal("the model's logits are not numbers: its weights or this prompt overflow")
                self._end(answer, FinishReason.ERROR, error)
                continue
            self._observe_token(answer, now_ns)
            event = answer.take(token_id, row, now_ns)
            if event is not None:
                self._events.append(event)
            if answer.finish_reason is not None:
                self._finish(answer)

    def _take_vectors(self, plan: StepPlan, vectors: FloatArray, now_ns: int) -> None:
        """Of a model that embeds: a text is done with its last token."""
        for (generation, count), vector in zip(plan.shares, vectors, strict=True):
            if generation.state is GenerationState.FINISHED:
                continue
            answer = self._answers[generation.id]
            answer.add_vector(vector, is_first=generation.num_computed == count)
            if generation.num_left == 0:
                self._observe_token(answer, now_ns)
                self._events.append(answer.end_with_vector(now_ns))
                self._finish(answer)

    def _take_prompt_logprobs(self, plan: StepPlan, output: StepOutput) -> None:
        """They are one generation's (see StepPlan.follows_prompt), in order of position."""
        if not output.followed:
            return
        for generation, count in plan.shares:
            if generation.sampling.prompt_logprobs is not None and generation.num_output == 0:
                start = generation.num_computed - count
                for offset, row in enumerate(output.followed, start=1):
                    if generation.state is not GenerationState.FINISHED:
                        self._answers[generation.id].take_prompt_logprobs(start + offset, row)

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        logger.error("a step of model '%s' failed", self.name, exc_info=error)
        self.scheduler.roll_back(plan)
        told = error if isinstance(error, EnginehouseError) else Internal(f"the model failed: {error!r}")
        for generation, _ in plan.shares:
            if generation.state is not GenerationState.FINISHED:
                self._end(self._answers[generation.id], FinishReason.ERROR, told)

    # --- ends
    def _expire(self, now_ns: int) -> None:
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            _, request_id = heapq.heappop(self._deadlines)
            answer = self._answers.get(request_id)
            if answer is not None and answer.generation.deadline_ns <= now_ns:
                self._end(answer, FinishReason.ERROR, DeadlineExceeded("the request's deadline has passed"))

    def _end(self, answer: Answer, reason: FinishReason, error: EnginehouseError | None = None) -> None:
        self._events.append(answer.end(reason, error))
        self._finish(answer)

    def _finish(self, answer: Answer) -> None:
        generation = answer.generation
        del self._answers[generation.id]
        if not self._answers:
            self._deadlines.clear()
        self.scheduler.finish(generation)
        assert generation.state is GenerationState.FINISHED, "bug: a finished generation lives on"
        self._observe_end(answer)

    def _send_now(self, event: TokenEvent) -> None:
        self._events.append(event)
        self.flush()

    # --- metrics
    def _observe_token(self, answer: Answer, now_ns: int) -> None:
        metrics = self.metrics
        metrics.generation_tokens += 1
        if answer.last_token_ns:
            metrics.token_s.observe((now_ns - answer.last_token_ns) / 1e9)
            return
        generation = answer.generation
        metrics.first_token_s.observe((now_ns - generation.arrived_ns) / 1e9)
        cached = max(generation.num_cached, 0)
        metrics.prompt_tokens += generation.num_prompt
        metrics.prompt_tokens_cached += cached
        metrics.prefix_queries += generation.num_prompt
        metrics.prefix_hits += cached

    def _count_step(self, plan: StepPlan) -> None:
        scheduler, metrics = self.scheduler, self.metrics
        metrics.step_tokens.observe(plan.num_tokens)
        metrics.num_preemptions = scheduler.num_preemptions
        self.refresh_gauges()

    def refresh_gauges(self) -> None:
        scheduler, metrics = self.scheduler, self.metrics
        metrics.num_running, metrics.num_waiting = len(scheduler.running), len(scheduler.waiting)
        available = scheduler.space.num_available(self.name)
        live = scheduler.pool.num_live
        metrics.kv_usage = live / (live + available) if live else 0.0

    def _observe_end(self, answer: Answer) -> None:
        generation, metrics = answer.generation, self.metrics
        assert answer.finish_reason is not None, "bug: ended without a reason"
        metrics.finished[answer.finish_reason] += 1
        now_ns = time.monotonic_ns()
        metrics.request_s.observe((now_ns - generation.arrived_ns) / 1e9)
        metrics.request_prompt_tokens.observe(generation.num_prompt)
        metrics.request_generation_tokens.observe(generation.num_output)
        metrics.request_max_generation_tokens.observe(generation.max_total - generation.num_prompt)
        metrics.request_params_n.observe(1)
        if generation.sampling.max_tokens is not None:
            metrics.request_params_max_tokens.observe(generation.sampling.max_tokens)
        if not answer.first_token_ns:
            return
        metrics.request_prefill_computed.observe(generation.num_prompt - max(generation.num_cached, 0))
        scheduled, first, last = generation.first_scheduled_ns, answer.first_token_ns, answer.last_token_ns
        metrics.queue_s.observe((scheduled - generation.arrived_ns) / 1e9)
        metrics.prefill_s.observe((first - scheduled) / 1e9)
        metrics.decode_s.observe((last - first) / 1e9)
        metrics.inference_s.observe((last - scheduled) / 1e9)
        if generation.num_output > 1:
            metrics.time_per_token_s.observe((last - first) / 1e9 / (generation.num_output - 1))
