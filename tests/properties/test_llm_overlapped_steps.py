"""Steps that are started before their forerunner has ended give every request the tokens that it would get alone.

The runner does everything as late as it may: a step is computed when somebody waits for it, from a block table and
sampled tokens that only its device knows. Tokens follow from all that the KV memory holds of a sequence, so a block
that is written too early, read too late or given to somebody else shows as a wrong token.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from enginehouse.types import FinishReason, SamplingParameters, TokenEvent
from enginehouse_backends.llm.answering import Answer
from enginehouse_backends.llm.arena import Arena
from enginehouse_backends.llm.block_pool import BlockPool, root_hash
from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.kv_space import KvSpace
from enginehouse_backends.llm.metrics import LlmMetrics
from enginehouse_backends.llm.page_ledger import PageLedger
from enginehouse_backends.llm.runner import IntArray, Runner, RunningStep, StepInput, StepOutput
from enginehouse_backends.llm.scheduler import Scheduler, SchedulerLimits
from enginehouse_backends.llm.served_llm import ServedLlm
from enginehouse_backends.llm.step_building import BlockTable

BLOCK_SIZE, VOCAB, MAX_BLOCKS, NUM_SLOTS, PER_PAGE = 2, 7, 12, 4, 2


def following(past: bytes) -> int:
    return past[0] % VOCAB


def extended(past: bytes, token: int) -> bytes:
    return hashlib.blake2b(past + bytes([token]), digest_size=4).digest()


@dataclass
class LateStep(RunningStep):
    runner: LateRunner
    step: StepInput
    rows: IntArray
    """The changed rows of the block table as they were when it was started."""
    fails: bool
    output: list[int] | None = None
    may_overlap: bool = True

    def finish(self) -> StepOutput:
        self.runner.compute_until(self)
        if self.fails:
            raise RuntimeError("the device is on fire")
        assert self.output is not None
        return StepOutput(self.output, [])


class LateRunner(Runner):
    """See module."""

    max_wanted, block_size, weight_bytes, workspace_bytes = 64, BLOCK_SIZE, 0, 0
    block_bytes = 256

    def __init__(self, generator: random.Random, is_asynchronous: bool, failing: float = 0.0) -> None:
        self.random, self.is_asynchronous, self.failing = generator, is_asynchronous, failing
        self.queue: deque[LateStep] = deque()
        self.table = np.zeros((NUM_SLOTS, MAX_BLOCKS), dtype=np.int32)
        self.memory: dict[tuple[int, int], bytes] = {}
        self.sampled: list[int] = []
        self.most_unfinished = 0

    def attach_arena(self, arena: Arena) -> None: ...
    def copy_blocks(self, source_places: IntArray, target_places: IntArray) -> None: ...
    def close(self) -> None: ...

    def run(self, step: StepInput) -> StepOutput:
        return self.start(step).finish()

    def start(self, step: StepInput) -> RunningStep:
        overlaps = not any(generation.sampling.logprobs is not None for generation in step.sampled)
        fails = self.random.random() < self.failing
        self.queue.append(
            LateStep(self, step, step.block_table[list(step.changed_slots)], fails, may_overlap=overlaps)
        )
        self.most_unfinished = max(self.most_unfinished, len(self.queue))
        return self.queue[-1]

    def compute_until(self, wanted: LateStep) -> None:
        while wanted.output is None:
            self.compute(self.queue.popleft())

    def compute(self, late: LateStep) -> None:
        step = late.step
        self.table[list(step.changed_slots)] = late.rows
        tokens = step.tokens.tolist()
        for row, index in step.unseen:
            tokens[row] = self.sampled[index]
        for slot, first, stop in zip(step.slots, step.query_starts, step.query_starts[1:], strict=False):
            for row in range(first, stop):
                position = int(step.positions[row])
                past = b"" if position == 0 else self.memory[self.place(slot, position - 1)]
                self.memory[self.place(slot, position)] = extended(past, tokens[row])
        chosen = []
        for row in step.wanted_rows[step.sampled_rows]:
            sequence = int(np.searchsorted(step.query_starts, row, side="right")) - 1
            chosen.append(following(self.memory[self.place(step.slots[sequence], int(step.positions[row]))]))
        self.sampled = late.output = chosen

    def place(self, slot: int, position: int) -> tuple[int, int]:
        return int(self.table[slot, position // BLOCK_SIZE]), position % BLOCK_SIZE


@dataclass
class Life:
    """One LLM under random requests."""

    random: random.Random
    is_asynchronous: bool
    failing: float = 0.0
    num_pages: int = 7
    found: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)
    generations: dict[str, Generation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        space, pool = KvSpace(PageLedger(self.num_pages)), BlockPool(PER_PAGE)
        space.join("m", pool)
        limits = SchedulerLimits(BLOCK_SIZE, NUM_SLOTS, max_batched_tokens=9, min_chunk_tokens=1)
        table = BlockTable(NUM_SLOTS, MAX_BLOCKS, PER_PAGE, 1, PER_PAGE)
        scheduler = Scheduler("m", pool, space, limits, table.follow)
        self.runner = LateRunner(self.random, self.is_asynchronous, self.failing)
        metrics = LlmMetrics("m", 100, {})
        self.llm = ServedLlm("m", scheduler, self.runner, table, metrics, self._take, 100)

    def _take(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            assert event.request_id not in self.reasons, "events after the last one"
            self.found.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish_reason is not None:
                self.reasons[event.request_id] = event.finish_reason

    def arrive(self) -> None:
        name = str(len(self.generations))
        prompt = [self.random.randrange(2) for _ in range(self.random.randint(1, 10))]
        generation = Generation(
            name, array("i", prompt), len(prompt),
            SamplingParameters(logprobs=0 if self.random.random() < 0.1 else None),
            max_total=len(prompt) + self.random.randint(1, 12),
            priority=self.random.choice((0, 0, 0, 1)),
            root=root_hash("m"),
            stop_token_ids=frozenset(self.random.sample(range(VOCAB), self.random.choice((0, 0, 1)))),
        )  # fmt: skip
        self.generations[name] = generation
        self.llm.add(Answer(generation, None, frozenset(), streaming=True))

    def live(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.llm.num_open < 8 and self.random.random() < 0.3:
                self.arrive()
            alive = [name for name in self.generations if name not in self.reasons]
            if alive and self.random.random() < 0.03:
                self.llm.cancel(self.random.choice(alive))
            if self.llm.has_work:
                self.llm.step()
        while self.llm.has_work:
            self.llm.step()

    def check(self) -> None:
        """Everybody got their tokens, and nothing is held."""
        assert self.reasons.keys() == self.generations.keys(), "somebody waits for ever"
        for name, generation in self.generations.items():
            expected = alone(generation)
            found = self.found[name]
            whole = self.reasons[name] in (FinishReason.STOP, FinishReason.LENGTH)
            assert found == (expected if whole else expected[: len(found)]), name
            assert generation.num_unseen == 0
        self.llm.scheduler.check_integrity()
        assert self.llm.scheduler.pool.num_live == 0


def alone(generation: Generation) -> list[int]:
    past = b""
    tokens: list[int] = []
    for token in generation.tokens[: generation.num_prompt]:
        past = extended(past, token)
    while len(tokens) < generation.max_total - generation.num_prompt:
        tokens.append(following(past))
        if tokens[-1] in generation.stop_token_ids:
            break
        past = extended(past, tokens[-1])
    return tokens


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_everybody_gets_the_tokens_of_being_alone(is_asynchronous: bool) -> None:
    life = Life(random.Random(3), is_asynchronous)
    life.live(4000)
    life.check()
    reasons = list(life.reasons.values())
    assert min(reasons.count(reason) for reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT)) > 50
    assert life.llm.scheduler.num_preemptions > 30
    assert life.llm.metrics.prefix_hits > 1000
    assert (life.llm.num_overlapped > 2000) is is_asynchronous
    assert life.runner.most_unfinished == (2 if is_asynchronous else 1)


def test_a_step_that_fails_takes_its_follower_along_and_nobody_else() -> None:
    life = Life(random.Random(5), True, failing=0.02)
    life.live(4000)
    life.check()
    assert list(life.reasons.values()).count(FinishReason.ERROR) > 100


def test_a_last_token_that_is_known_to_be_the_last_starts_no_further_step() -> None:
    life = Life(random.Random(0), True)
    generation = Generation("a", array("i", [1]), 1, SamplingParameters(), max_total=4, root=root_hash("m"))
    life.generations["a"] = generation
    life.llm.add(Answer(generation, None, frozenset(), streaming=True))
    num_steps = 0
    while life.llm.has_work:
        num_steps += bool(life.llm.step().shares)
    assert num_steps == 3
    life.check()
