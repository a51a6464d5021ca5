"""Random life of several LLMs over one arena, against a model of what every block holds.

An alphabet of two tokens makes prompts share prefixes all the time; small pools make preemption, eviction and
page moves common. The simulated memory knows, for every position of every block, which tokens led there: a
generation that reads anything but its own past is a fault.
"""

from __future__ import annotations

import random
from array import array

import pytest

from enginehouse.types import SamplingParameters
from enginehouse_backends.llm.block_pool import BlockPool, chain_hash, root_hash
from enginehouse_backends.llm.generation import Generation, GenerationState
from enginehouse_backends.llm.kv_space import KvSpace
from enginehouse_backends.llm.page_ledger import PageLedger
from enginehouse_backends.llm.scheduler import Scheduler, SchedulerLimits, StepPlan

NUM_STEPS = 100_000
BLOCK_SIZE = 2


class Simulation:
    """Schedulers of several models over one arena, and the memory that their plans write."""

    def __init__(self, seed: int, num_models: int, num_pages: int) -> None:
        self.random = random.Random(seed)
        self.space = KvSpace(PageLedger(num_pages))
        self.schedulers: list[Scheduler] = []
        self.memory: dict[tuple[str, int], dict[int, bytes]] = {}
        self.tables: dict[Generation, list[int]] = {}
        self.alive: list[tuple[Scheduler, Generation]] = []
        self.num_made = self.num_shared = self.num_preempted = 0
        for index in range(num_models):
            self._add_model(f"model{index}", blocks_per_page=index + 2)

    def _add_model(self, name: str, blocks_per_page: int) -> None:
        pool = BlockPool(blocks_per_page)
        self.space.join(name, pool)
        limits = SchedulerLimits(
            block_size=BLOCK_SIZE,
            max_running=4,
            max_batched_tokens=self.random.randint(5, 12),
            min_chunk_tokens=1,
        )
        scheduler = Scheduler(name, pool, self.space, limits, self._follow_table)
        scheduler.latency.observe(1, 0, 0.01)  # prompts are slow: chunks are small, and bursts stall decoding
        scheduler.latency.observe(1, 16, 0.17)
        self.schedulers.append(scheduler)

    def _follow_table(self, generation: Generation, first: int) -> None:
        table = self.tables.setdefault(generation, [])
        table[first:] = generation.blocks[first:]

    def step(self) -> None:
        for scheduler in self.schedulers:
            if self.random.random() < 0.3 and len(scheduler.waiting) < 5:
                self._arrive(scheduler)
            if self.random.random() < 0.8:
                self._run(scheduler)
        if self.alive and self.random.random() < 0.05:
            self._end(self.random.randrange(len(self.alive)))

    def _arrive(self, scheduler: Scheduler) -> None:
        most = scheduler.space.guaranteed_blocks(scheduler.name) * BLOCK_SIZE
        total = self.random.randint(2, most)
        prompt = array("i", [self.random.randrange(2) for _ in range(self.random.randint(1, total - 1))])
        generation = Generation(
            id=str(self.num_made),
            tokens=prompt,
            num_prompt=len(prompt),
            sampling=SamplingParameters(),
            max_total=total,
            priority=self.random.choice((0, 0, 0, 1, 2)),
            tenant=self.random.choice(("", "a", "b")),
            root=root_hash(scheduler.name, salt=self.random.choice(("", "", "salt"))),
        )
        self.num_made += 1
        scheduler.add(generation)
        self.alive.append((scheduler, generation))

    def _end(self, index: int) -> None:
        scheduler, generation = self.alive.pop(index)
        scheduler.finish(generation)

    def _run(self, scheduler: Scheduler) -> None:
        plan = scheduler.plan(now_ns=scheduler.step)
        self.num_preempted += len(plan.preempted)
        if not plan.shares and scheduler.has_work:
            self._make_way_for(scheduler)
        if self.random.random() < 0.02:
            self._fail(scheduler, plan)
            return
        self._write(scheduler, plan)
        self._read(scheduler, plan)
        for generation, _ in plan.shares:
            if generation.num_left == 0:
                self._append(scheduler, generation)

    def _make_way_for(self, scheduler: Scheduler) -> None:
        donor = self.space.busy_donor(scheduler.name)
        if donor is None:
            return
        giving = next(other for other in self.schedulers if other.name == donor)
        emptied = giving.empty_page()
        assert emptied is not None
        page, moves = emptied
        for source, target in moves:
            self.memory[donor, target] = dict(self.memory.get((donor, source), {}))
        self.space.give_up(donor, page)

    def _fail(self, scheduler: Scheduler, plan: StepPlan) -> None:
        scheduler.roll_back(plan)
        for generation, _ in plan.shares:
            self._end(self.alive.index((scheduler, generation)))

    def _write(self, scheduler: Scheduler, plan: StepPlan) -> None:
        for generation, count in plan.shares:
            assert self.tables[generation] == generation.blocks
            for position in range(generation.num_computed - count, generation.num_computed):
                block = generation.blocks[position // BLOCK_SIZE]
                content = self.memory.setdefault((scheduler.name, block), {})
                content[position % BLOCK_SIZE] = past(generation, position)

    def _read(self, scheduler: Scheduler, plan: StepPlan) -> None:
        for generation, count in plan.shares:
            assert 0 < count <= generation.num_computed <= len(generation.tokens)
            for position in range(generation.num_computed):
                block = generation.blocks[position // BLOCK_SIZE]
                content = self.memory[scheduler.name, block]
                assert content[position % BLOCK_SIZE] == past(generation, position), "reads another's past"
            self.num_shared += sum(scheduler.pool.references(block) > 1 for block in generation.blocks)

    def _append(self, scheduler: Scheduler, generation: Generation) -> None:
        generation.tokens.append(self.random.randrange(2))
        if len(generation.tokens) >= generation.max_total:
            self._end(self.alive.index((scheduler, generation)))

    def check(self) -> None:
        self.space.check_integrity()
        for scheduler in self.schedulers:
            scheduler.check_integrity()


def past(generation: Generation, position: int) -> bytes:
    """Stands for the keys and values at a position: what they depend on."""
    return chain_hash(generation.root, generation.tokens[: position + 1])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("seed", "num_models", "num_pages", "num_steps"),
    [(1, 1, 6, NUM_STEPS), (2, 2, 9, NUM_STEPS // 2), (3, 3, 10, NUM_STEPS // 2)],
)
def test_nobody_reads_anothers_past(seed: int, num_models: int, num_pages: int, num_steps: int) -> None:
    simulation = Simulation(seed, num_models, num_pages)
    for step in range(num_steps):
        simulation.step()
        if step % 16 == 0:
            simulation.check()
    assert simulation.num_shared > 1000
    assert simulation.num_preempted > 1000
    if num_models > 1:
        assert simulation.space.num_moved_pages > 1000


@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_everything_finishes_and_nothing_remains(num_models: int) -> None:
    simulation = Simulation(7, num_models, 4 * num_models)
    for _ in range(300):
        simulation.step()
    arrived = [generation for _, generation in simulation.alive]
    for _ in range(20_000):
        if not simulation.alive:
            break
        for scheduler in simulation.schedulers:
            simulation._run(scheduler)
    assert not simulation.alive, "starved"
    assert all(generation.state is GenerationState.FINISHED for generation in arrived)
    simulation.check()
    assert all(scheduler.pool.num_live == 0 for scheduler in simulation.schedulers)
