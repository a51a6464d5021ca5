"""The GPU runner on a simulated device: its own code and kernels (through Triton's interpreter), greedy tokens
against transformers. The device does everything as late as it may.
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from enginehouse.types import SamplingParameters
from enginehouse_backends.llm.architecture import read_architecture
from enginehouse_backends.llm.arena import Arena
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.cuda_staging import CudaRunnerSettings
from enginehouse_backends.llm.device_runtime import SimulatedRuntime
from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.kernels import interpreting
from enginehouse_backends.llm.runner import RunningStep, StepInput
from enginehouse_backends.llm.runner_cuda import CudaRunner
from tests.acceptance.llm.small_models import MAX_POSITIONS, VOCAB, save_reference

interpreting.install()

NUM_SLOTS = 4
PAGE_BYTES = 1 << 20
GREEDY = SamplingParameters(temperature=0.0)
MORE = ("qwen3", "mixtral", "qwen3-moe", "phi3", "gemma3")


def make_runner(folder: Path, **settings: Any) -> tuple[CudaRunner, SimulatedRuntime]:
    runtime = SimulatedRuntime(num_multiprocessors=16)
    chosen = CudaRunnerSettings(
        settings.pop("dtype", torch.float32), max_tokens=64, max_sequences=NUM_SLOTS, max_wanted=NUM_SLOTS + 8,
        max_positions=MAX_POSITIONS, **settings,
    )  # fmt: skip
    runner = CudaRunner(read_architecture(folder), Checkpoint(folder), chosen, runtime)
    memory = torch.full((8 * PAGE_BYTES,), 0xFF, dtype=torch.uint8)  # not-a-number wherever nothing was written
    runner.attach_arena(Arena(memory, PAGE_BYTES, 8))
    return runner, runtime


@dataclass
class Crowd:
    """Sequences in slots that a test steps by hand, tokens unseen where a step is still running."""

    runner: CudaRunner
    generations: list[Generation] = field(default_factory=list)
    running: RunningStep | None = None
    running_sampled: list[Generation] = field(default_factory=list)

    def __post_init__(self) -> None:
        blocks_each = MAX_POSITIONS // self.runner.block_size
        arena = self.runner._arena
        assert arena is not None
        blocks = np.random.default_rng(1).permutation(NUM_SLOTS * blocks_each).astype(np.int32)
        self.places = arena.places(blocks, self.runner.block_bytes).reshape(NUM_SLOTS, blocks_each)
        self.table = np.zeros_like(self.places)
        self.changed: set[int] = set()

    def add(self, prompt: list[int], sampling: SamplingParameters = GREEDY, seed: int = 0) -> Generation:
        generation = Generation(
            f"g{len(self.generations)}", array("i", prompt), len(prompt), sampling, 10**6, seed=seed
        )
        generation.slot = len(self.generations)
        self.generations.append(generation)
        return generation

    def start(self, shares: list[tuple[Generation, int]]) -> None:
        """Starts a step that computes so many tokens of each, then finishes the step before."""
        step = self._step(shares)
        before, before_sampled = self.running, self.running_sampled
        self.running, self.running_sampled = self.runner.start(step), list(step.sampled)
        for generation in step.sampled:
            generation.num_unseen += 1
        self._take(before, before_sampled)

    def finish(self) -> None:
        before, before_sampled, self.running, self.running_sampled = self.running, self.running_sampled, None, []
        self._take(before, before_sampled)

    def _take(self, running: RunningStep | None, sampled: list[Generation]) -> None:
        if running is None:
            return
        for generation, token in zip(sampled, running.finish().token_ids, strict=True):
            generation.num_unseen -= 1
            generation.tokens.append(token)

    def _step(self, shares: list[tuple[Generation, int]]) -> StepInput:
        tokens: list[int] = []
        positions, unseen, wanted, sampled = [], [], [], []
        for generation, count in shares:
            for position in range(generation.num_computed, generation.num_computed + count):
                if position >= len(generation.tokens):
                    unseen.append((len(tokens), self.running_sampled.index(generation)))
                tokens.append(generation.tokens[position] if position < len(generation.tokens) else -99)
                positions.append(position)
            generation.num_computed += count
            self._place(generation)
            if generation.num_left == 0:
                wanted.append(len(tokens) - 1)
                sampled.append(generation)
        changed, self.changed = sorted(self.changed), set()
        return StepInput(
            tokens=_ints(tokens),
            positions=_ints(positions),
            query_starts=_ints([0, *itertools.accumulate(count for _, count in shares)]),
            context_lengths=_ints([generation.num_computed for generation, _ in shares]),
            slots=_ints([generation.slot for generation, _ in shares]),
            block_table=self.table,
            changed_slots=changed,
            wanted_rows=_ints(wanted),
            sampled=sampled,
            sampled_rows=np.arange(len(sampled), dtype=np.int32),
            unseen=unseen,
        )

    def _place(self, generation: Generation) -> None:
        needed = -(-generation.num_computed // self.runner.block_size)
        have = len(generation.blocks)
        if needed > have:
            generation.blocks = list(range(needed))
            row = generation.slot
            self.table[row, have:needed] = self.places[row, have:needed]
            self.changed.add(row)


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(3, VOCAB, length).tolist() for length in (4, 21, 9)]


def greedy(reference: Any, prompt: list[int], count: int) -> list[int]:
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    with torch.inference_mode():
        ids: list[int] = reference.generate(torch.tensor([prompt]), **settings)[0].tolist()
    return ids[len(prompt) :]


def _ints(values: Any) -> Any:
    return np.array(values, dtype=np.int32)


def generate_overlapped(crowd: Crowd, count: int) -> list[list[int]]:
    """Prompts in chunks and one after the other, decoding beside them, each step started before its forerunner ends."""
    first, second, third = (crowd.add(prompt) for prompt in prompts())
    crowd.start([(first, 4)])
    crowd.start([(first, 1), (second, 12)])
    crowd.start([(second, 9), (first, 1), (third, 9)])
    everyone = [third, first, second]
    while min(generation.num_output + generation.num_unseen for generation in everyone) < count:
        crowd.start([(generation, 1) for generation in everyone])
    crowd.finish()
    return [list(generation.tokens[generation.num_prompt :])[:count] for generation in (first, second, third)]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["llama", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_overlapped_steps_give_transformers_tokens(name: str, tmp_path: Path) -> None:
    reference = save_reference(name, tmp_path)
    runner, runtime = make_runner(tmp_path)
    waits = runtime.num_waits
    found = generate_overlapped(Crowd(runner), 4)
    assert found == [greedy(reference, prompt, 4) for prompt in prompts()]
    num_steps = 3 + runtime.num_replays
    assert runtime.num_replays >= 2
    assert runtime.num_waits - waits == num_steps, "the host waits once a step"


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Any, Path]:
    return save_reference("llama", tmp_path), tmp_path


def test_a_padded_bucket_changes_no_token_and_writes_nothing_else(llama: tuple[Any, Path]) -> None:
    reference, folder = llama
    runner, runtime = make_runner(folder)
    assert runner._batch_sizes == [1, 2, 4]
    crowd = Crowd(runner)
    generations = [crowd.add(prompt) for prompt in prompts()]
    crowd.start([(generation, generation.num_prompt) for generation in generations])
    crowd.finish()
    assert runner._arena is not None
    before = runner._arena.memory.clone()
    crowd.start([(generation, 1) for generation in generations])  # three of four
    crowd.finish()
    assert runtime.num_replays == 1
    touched = (runner._arena.memory != before).nonzero()[:, 0] // runner.block_bytes
    own = {int(crowd.table[g.slot, g.num_computed // 16]) * 256 // runner.block_bytes for g in generations}
    assert set(touched.tolist()) <= own, "padding wrote into somebody's block"
    assert [list(g.tokens[g.num_prompt :]) for g in generations] == [greedy(reference, p, 2) for p in prompts()]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_graphs_and_single_kernels_give_the_same_tokens(llama: tuple[Any, Path]) -> None:
    _, folder = llama
    with_graphs, _ = make_runner(folder)
    without, runtime = make_runner(folder, use_graphs=False)
    assert generate_overlapped(Crowd(with_graphs), 3) == generate_overlapped(Crowd(without), 3)
    assert runtime.num_captures == 0


def test_penalties_and_logprobs_are_the_hosts_and_leave_the_others_alone(llama: tuple[Any, Path]) -> None:
    reference, folder = llama
    runner, _ = make_runner(folder)
    crowd = Crowd(runner)
    plain = crowd.add(prompts()[0])
    biased = crowd.add(prompts()[1], SamplingParameters(temperature=0.0, logit_bias={9: 1000.0}, logprobs=2))
    crowd.start([(plain, 4), (biased, 21)])
    assert crowd.running is not None
    assert not crowd.running.may_overlap
    output = crowd.running.finish()
    assert output.token_ids[0] == greedy(reference, prompts()[0], 1)[0]
    assert output.token_ids[1] == 9
    logprobs = output.logprobs[1]
    assert logprobs is not None
    with torch.inference_mode():
        expected = reference(torch.tensor([prompts()[1]])).logits[0, -1].log_softmax(-1)
    assert logprobs.logprob == pytest.approx(float(expected[9]), abs=1e-3)
    assert list(logprobs.top_ids) == expected.topk(2).indices.tolist()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_seeded_request_draws_the_same_tokens_in_any_company(llama: tuple[Any, Path]) -> None:
    _, folder = llama
    random = SamplingParameters(temperature=1.0, top_k=20)
    drawn = []
    for company in (0, 2):
        crowd = Crowd(make_runner(folder)[0])
        mine = crowd.add(prompts()[0], random, seed=5)
        others = [crowd.add(prompt, random, seed=index) for index, prompt in enumerate(prompts()[1 : 1 + company])]
        crowd.start([(g, g.num_prompt) for g in [*others, mine]])
        for _ in range(2):
            crowd.start([(g, 1) for g in [*others, mine]])
        crowd.finish()
        drawn.append(list(mine.tokens[mine.num_prompt :]))
    assert drawn[0] == drawn[1]


def test_blocks_move_in_the_order_of_the_stream(llama: tuple[Any, Path]) -> None:
    reference, folder = llama
    runner, _ = make_runner(folder)
    crowd = Crowd(runner)
    generation = crowd.add(prompts()[1])
    crowd.start([(generation, 21)])
    old = crowd.table[0, :2].copy()
    new = crowd.places[3, :2]
    runner.copy_blocks(old, new)
    crowd.table[0, :2] = new
    crowd.changed.add(0)
    crowd.start([(generation, 1)])
    crowd.finish()
    assert list(generation.tokens[21:]) == greedy(reference, prompts()[1], 2)


def test_an_fp8_caches_scales_are_the_checkpoints(llama: tuple[Any, Path]) -> None:
    """Keys a thousand times too large for FP8 are kept by a scale, and cut off without."""
    reference, folder = llama
    weights = load_file(folder / "model.safetensors")
    for layer in range(3):
        weights[f"model.layers.{layer}.self_attn.k_proj.weight"] *= 1000
        weights[f"model.layers.{layer}.self_attn.q_proj.weight"] /= 1000
        weights[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor([1000.0])
    save_file(weights, folder / "model.safetensors")
    plain, _ = make_runner(folder)
    expected = [list(greedy(reference, prompt, 1)) for prompt in prompts()]
    assert generate_overlapped(Crowd(plain), 1) == expected
    scaled, _ = make_runner(folder, kv_cache_dtype=torch.float8_e4m3fn)
    assert scaled._caches[0].key_scale == 1000.0
    found = generate_overlapped(Crowd(scaled), 1)
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_fp8_cache_stays_close(llama: tuple[Any, Path]) -> None:
    """Two of three tokens of random weights' nearly flat logits: keys and values keep 4 bits."""
    reference, folder = llama
    runner, _ = make_runner(folder, kv_cache_dtype=torch.float8_e4m3fn)
    plain, _ = make_runner(folder)
    assert runner.block_bytes * 4 == plain.block_bytes
    found = generate_overlapped(Crowd(runner), 1)
    expected = [greedy(reference, prompt, 1) for prompt in prompts()]
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= 2
