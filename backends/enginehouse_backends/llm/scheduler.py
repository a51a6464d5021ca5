"""Which tokens the next step computes, for whom, and which blocks they use.

Pure: no tensors, no clock (time comes in), no lock. There is no prefill phase and no decode phase: each
generation has computed and known tokens, and a step hands out a budget until they meet. Decoding goes first;
what prompts may add is sized so that the step stays under the latency target.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from enginehouse_backends.llm.block_pool import BlockPool, chain_hash
from enginehouse_backends.llm.generation import Generation, GenerationState
from enginehouse_backends.llm.kv_space import KvSpace
from enginehouse_backends.llm.latency_model import LatencyModel
from enginehouse_backends.llm.prompt_policy import PromptPolicy
from enginehouse_backends.llm.waiting_queue import WaitingQueue


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """`target_itl_s` is for a step that also decodes; 0 leaves it to PromptPolicy."""

    block_size: int = 32
    max_running: int = 64
    max_batched_tokens: int = 512
    min_chunk_tokens: int = 16
    target_itl_s: float = 0.0
    longest_step_s: float = 0.0
    """Of prompts alone, beyond 512 tokens; 0 is any."""
    max_followed_tokens: int = 64
    """Prompt tokens of a step whose logprobs are wanted: each has a row of logits."""
    prefix_caching: bool = True


@dataclass(slots=True)
class StepPlan:
    """`shares`: who computes how many tokens; those with one known token left decode."""

    shares: list[tuple[Generation, int]] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_decoding: int = 0
    preempted: list[Generation] = field(default_factory=list)
    registered: list[int] = field(default_factory=list)
    """Blocks that became findable with this step: to be unregistered if it fails."""
    follows_prompt: bool = False
    """Somebody's prompt logprobs are computed in this step: one at a time."""
    starved: Generation | None = None
    """One that can't go on although nobody else of this model holds blocks: only another's pages can help."""
    waits_for_step: bool = False  # set by who ran it: a step that has just ended may have changed why it is empty


OnBlocks = Callable[[Generation, int], None]
"""Told that a generation's blocks from that index on are new."""


class Scheduler:
    """One model's. Owns the generations from `add` to `finish`; `name` is the model's in the KvSpace."""

    def __init__(
        self,
        name: str,
        pool: BlockPool,
        space: KvSpace,
        limits: SchedulerLimits,
        on_blocks: OnBlocks = lambda generation, first: None,
    ) -> None:
        self.name, self.pool, self.space, self.limits = name, pool, space, limits
        self.latency = LatencyModel()
        self.prompts = PromptPolicy(
            limits.max_batched_tokens, limits.min_chunk_tokens, limits.target_itl_s, limits.longest_step_s
        )
        self.waiting = WaitingQueue()
        self.running: list[Generation] = []
        """By priority, then arrival: the last one is preempted first."""
        self.step = 0
        self.num_preemptions = 0
        self.expected_output = 64.0
        """Learnt from those that finished: how many tokens a generation will still want."""
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self._arrivals = 0
        self._pending: dict[bytes, Generation] = {}
        """Prompt blocks that a running generation will compute, by hash: others wait for them."""
        self._on_blocks = on_blocks

    # --- coming and going
    def add(self, generation: Generation) -> None:
        generation.arrival = self._arrivals
        self._arrivals += 1
        generation.state = GenerationState.WAITING
        self.waiting.add(generation)

    def finish(self, generation: Generation) -> None:
        """Gives everything that it holds back. Waiting, running or never seen."""
        if generation.state is GenerationState.RUNNING:
            self._leave_running(generation)
            self.expected_output += 0.05 * (generation.num_output - self.expected_output)
        elif generation.state is GenerationState.WAITING:
            self.waiting.remove(generation)
        generation.state = GenerationState.FINISHED

    def roll_back(self, plan: StepPlan) -> None:
        """The step failed: what it was to write must not be found. The caller finishes its generations."""
        for block in plan.registered:
            self.pool.unregister(block)

    @property
    def has_work(self) -> bool:
        return bool(self.running or len(self.waiting))

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    # --- planning
    def plan(self, now_ns: int) -> StepPlan:
        """The next step. Computed tokens, blocks and prefix hashes are as if it had run."""
        self.step += 1
        plan = StepPlan()
        self._make_room_for_urgent(plan)
        decoding = [generation for generation in self.running if generation.num_left == 1]
        backlog = self._backlog_tokens(decoding)
        if self.prompts.may_stall(decoding, backlog, self.latency):
            backlog -= self._num_cached_tokens()  # only now, as it takes a look at each
        if self.prompts.may_stall(decoding, backlog, self.latency):
            self._plan_shares(plan, self.prompts.budget_alone(self.latency), now_ns, stalled=True)
            if plan.shares:
                self.prompts.on_stall(decoding, plan.num_tokens)
                return plan
        plan.num_decoding = len(decoding)
        self._plan_shares(plan, self.prompts.budget_beside(decoding, backlog, self.latency), now_ns, stalled=False)
        self.prompts.on_decode()
        return plan

    def _backlog_tokens(self, decoding: list[Generation]) -> int:
        """Of prompts that wait or are under way, unless someone more urgent decodes."""
        urgent = self.waiting.best_priority()
        if urgent is not None and decoding and decoding[0].priority < urgent:
            return 0
        under_way = sum(generation.num_left for generation in self.running) - len(decoding)
        return under_way + (self.waiting.num_tokens if self._free_slots else 0)

    def _num_cached_tokens(self) -> int:
        """Of the prompts that wait and have a slot."""
        admitted = itertools.islice(self.waiting.in_order(), len(self._free_slots))
        return sum(len(self._match_prefix(generation)) for generation in admitted) * self.limits.block_size

    def _plan_shares(self, plan: StepPlan, budget: int, now_ns: int, stalled: bool) -> None:
        budget = self._plan_running(plan, budget, now_ns, stalled)
        if budget > 0 and len(self.waiting) and not plan.preempted:
            self._admit(plan, budget, now_ns)

    def _plan_running(self, plan: StepPlan, budget: int, now_ns: int, stalled: bool) -> int:
        """Shares for those that run already; gives what is left of the budget for prompts."""
        for generation in list(self.running):
            if generation.state is not GenerationState.RUNNING:
                continue  # preempted for one before it
            if plan.follows_prompt and _follows_prompt(generation):
                continue
            left = generation.num_left
            if (stalled and left <= 1) or generation.awaits_last_token:
                continue
            count = left if left <= 1 else min(left, budget, self._most_followed(generation))
            if count <= 0 or not self._grow_or_preempt(generation, count, plan):
                continue
            if left > 1:
                budget -= count
            self._schedule(generation, count, plan, now_ns)
        return budget

    def _admit(self, plan: StepPlan, budget: int, now_ns: int) -> None:
        outstanding = self._outstanding_blocks()
        for generation in self.waiting.in_order():
            if budget <= 0 or not self._free_slots:
                return
            if plan.follows_prompt and _follows_prompt(generation):
                continue
            matched = self._match_prefix(generation)
            if self._will_be_computed(generation, len(matched)):
                continue
            needed = self._expected_blocks(generation) - self._live_among(matched)
            if self.running and needed + outstanding > self.space.num_available(self.name):
                return
            self._enter_running(generation, matched)
            count = min(generation.num_left, budget, self._most_followed(generation))
            if not self._grow(generation, count):
                self._leave_running(generation)
                self._wait_again(generation)
                plan.starved = None if self.running else generation
                return
            budget -= count
            self._schedule(generation, count, plan, now_ns)
            outstanding += self._growth(generation)

    def _schedule(self, generation: Generation, count: int, plan: StepPlan, now_ns: int) -> None:
        plan.shares.append((generation, count))
        plan.num_tokens += count
        if generation.num_left > 1:
            plan.num_prompt_tokens += count
        if not generation.first_scheduled_ns:
            generation.first_scheduled_ns = now_ns
        generation.num_computed += count
        plan.follows_prompt |= _follows_prompt(generation)
        self.waiting.charge(generation.tenant, count)
        if self.limits.prefix_caching:
            self._register(generation, plan)

    def _most_followed(self, generation: Generation) -> int:
        limits = self.limits
        return limits.max_followed_tokens if _follows_prompt(generation) else limits.max_batched_tokens

    # --- blocks
    def _grow_or_preempt(self, generation: Generation, count: int, plan: StepPlan) -> bool:
        while not self._grow(generation, count):
            victim = self.running[-1]
            self.preempt(victim)
            plan.preempted.append(victim)
            if victim is generation:
                plan.starved = None if self.running else generation
                return False
        return True

    def _grow(self, generation: Generation, count: int) -> bool:
        """Blocks for `count` more tokens. On failure the ones that it got stay its own."""
        blocks, first = generation.blocks, len(generation.blocks)
        needed = self.blocks_for(generation.num_computed + count)
        while len(blocks) < needed:
            if self.pool.num_empty == 0:
                self.space.extend(self.name, self.step)
            block = self.pool.allocate(self.step)
            if block is None:
                break
            blocks.append(block)
        if len(blocks) > first:
            self._on_blocks(generation, first)
        return len(blocks) >= needed

    def preempt(self, generation: Generation) -> None:
        """Back to waiting with nothing computed; its full blocks stay findable as long as they last."""
        self._leave_running(generation)
        generation.num_preemptions += 1
        self.num_preemptions += 1
        self._wait_again(generation)

    def _wait_again(self, generation: Generation) -> None:
        generation.num_computed = 0
        generation.state = GenerationState.WAITING
        self.waiting.add(generation)

    def _enter_running(self, generation: Generation, matched: list[int]) -> None:
        self.waiting.remove(generation)
        for block in matched:
            self.pool.retain(block, self.step)
        generation.blocks = matched
        generation.num_computed = len(matched) * self.limits.block_size
        generation.num_registered = len(matched)
        if generation.num_cached < 0:
            generation.num_cached = generation.num_computed
        generation.slot = self._free_slots.pop()
        generation.state = GenerationState.RUNNING
        bisect.insort(self.running, generation, key=_order)
        for block_hash in generation.hashes[len(matched) :]:
            self._pending.setdefault(block_hash, generation)
        self._on_blocks(generation, 0)

    def _leave_running(self, generation: Generation) -> None:
        self.running.remove(generation)
        self.pool.release(generation.blocks, self.step)
        generation.blocks = []
        self._free_slots.append(generation.slot)
        generation.slot = -1
        for block_hash in generation.hashes:
            if self._pending.get(block_hash) is generation:
                del self._pending[block_hash]

    # --- prefixes
    def _match_prefix(self, generation: Generation) -> list[int]:
        """Blocks that hold its beginning already; at least one token is left to compute."""
        if not self.limits.prefix_caching:
            return []
        num_blocks = (generation.num_known - 1) // self.limits.block_size
        self._extend_hashes(generation, min(num_blocks, len(generation.tokens) // self.limits.block_size))
        if generation.sampling.prompt_logprobs is not None:
            return []  # each prompt token's logits are wanted
        matched: list[int] = []
        for block_hash in generation.hashes[:num_blocks]:
            block = self.pool.find(block_hash)
            if block is None:
                break
            matched.append(block)
        return matched

    def _will_be_computed(self, generation: Generation, num_matched: int) -> bool:
        """Whether a running one is about to compute its next block: waiting for it is cheaper."""
        if num_matched >= len(generation.hashes):
            return False
        return generation.hashes[num_matched] in self._pending

    def _register(self, generation: Generation, plan: StepPlan) -> None:
        # At plan time, so that whoever is planned next in this very step finds the block. The kernels write
        # all keys and values of a layer before anyone attends.
        size = self.limits.block_size
        full = min(generation.num_computed, len(generation.tokens)) // size
        if full <= generation.num_registered:
            return
        self._extend_hashes(generation, full)
        for index in range(generation.num_registered, full):
            block_hash = generation.hashes[index]
            if self.pool.register(generation.blocks[index], block_hash):
                plan.registered.append(generation.blocks[index])
            if self._pending.get(block_hash) is generation:
                del self._pending[block_hash]
        generation.num_registered = full

    def _extend_hashes(self, generation: Generation, num_blocks: int) -> None:
        hashes, size = generation.hashes, self.limits.block_size
        previous = hashes[-1] if hashes else generation.root
        for index in range(len(hashes), num_blocks):
            previous = chain_hash(previous, generation.tokens[index * size : (index + 1) * size])
            hashes.append(previous)

    # --- admission
    def _make_room_for_urgent(self, plan: StepPlan) -> None:
        """A waiting one with higher priority takes the place of the last running one with lower."""
        urgent = self.waiting.best_priority()
        while urgent is not None and self.running and self.running[-1].priority > urgent:
            generation = next(self.waiting.in_order())
            needed = self.blocks_for(generation.num_known + 1)
            if self._free_slots and needed <= self.space.num_available(self.name):
                return
            victim = self.running[-1]
            self.preempt(victim)
            plan.preempted.append(victim)

    def _outstanding_blocks(self) -> int:
        return sum(self._growth(generation) for generation in self.running)

    def _growth(self, generation: Generation) -> int:
        """Blocks that it will still want."""
        return max(self._expected_blocks(generation) - len(generation.blocks), 0)

    def _expected_blocks(self, generation: Generation) -> int:
        more = max(self.expected_output - generation.num_output, self.limits.block_size)
        return self.blocks_for(min(generation.num_known + int(more), generation.max_total))

    def _live_among(self, blocks: Iterable[int]) -> int:
        """Blocks that someone holds already cost nothing."""
        return sum(1 for block in blocks if self.pool.references(block) > 0)

    # --- giving a page to another model
    def empty_page(self) -> tuple[int, list[tuple[int, int]]] | None:
        """(a page that nobody uses any more, the block copies that the runner must do first, in order).

        Moves live blocks to other pages; where there is no room, preempts from the end. None if there is no
        page.
        """
        page = self.pool.emptiest_page()
        if page is None:
            return None
        moves: list[tuple[int, int]] = []
        num_followed = 0
        for block in self.pool.live_blocks_of(page):
            while self.pool.references(block) > 0:
                target = self.pool.allocate(self.step, avoid_page=page)
                if target is not None:
                    self.pool.move_identity(block, target)
                    moves.append((block, target))
                    break
                assert self.running, "bug: a block is held and nobody runs"
                self._follow(moves[num_followed:])
                num_followed = len(moves)
                self.preempt(self.running[-1])
        self._follow(moves[num_followed:])
        return page, moves

    def _follow(self, moves: list[tuple[int, int]]) -> None:
        moved = dict(moves)
        for generation in self.running:
            if any(block in moved for block in generation.blocks):
                generation.blocks = [moved.get(block, block) for block in generation.blocks]
                self._on_blocks(generation, 0)

    def check_integrity(self) -> None:
        """Raises AssertionError if blocks, slots or queues disagree with the generations."""
        held: dict[int, int] = {}
        for generation in self.running:
            for block in generation.blocks:
                held[block] = held.get(block, 0) + 1
        assert all(self.pool.references(block) == count for block, count in held.items()), (
            "bug: a block's references are not its holders"
        )
        assert self.pool.num_live == len(held), "bug: a block is live and nobody holds it"
        slots = [generation.slot for generation in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.limits.max_running)), "bug: a slot is lost or doubled"
        assert all(owner.state is GenerationState.RUNNING for owner in self._pending.values()), (
            "bug: a block is awaited from one that doesn't run"
        )
        self.pool.check_integrity()


def _follows_prompt(generation: Generation) -> bool:
    return generation.sampling.prompt_logprobs is not None and generation.num_output == 0


def _order(generation: Generation) -> tuple[int, int]:
    return generation.priority, generation.arrival


def tokens_of(values: Iterable[int]) -> array[int]:
    return array("i", values)
