"""Logits of the CPU runner, native and in torch, against transformers and against themselves."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import pytest
import torch

from enginehouse.types import SamplingParameters
from enginehouse_backends.llm.architecture import read_architecture
from enginehouse_backends.llm.arena import Arena, reserve_host_arena
from enginehouse_backends.llm.checkpoint import Checkpoint
from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.llm_settings import LlmSettings
from enginehouse_backends.llm.planning import plan_llm
from enginehouse_backends.llm.runner import StepInput
from enginehouse_backends.llm.runner_cpu import CpuRunner, CpuRunnerSettings
from enginehouse_backends.llm.runners import make_runner as make_runner_of_plan
from tests.acceptance.llm.small_models import CONFIGS, MAX_POSITIONS, NOT_NATIVE, VOCAB, save_reference

NUM_SLOTS = 4
PAGE_BYTES = 1 << 20


def make_runner(folder: Path, native: bool, dtype: torch.dtype = torch.float32, quantization: str = "") -> CpuRunner:
    settings = CpuRunnerSettings(
        dtype,
        max_tokens=256,
        max_wanted=256,
        max_positions=MAX_POSITIONS,
        num_threads=2,
        native=native,
        quantization=quantization,
    )
    runner = CpuRunner(read_architecture(folder), Checkpoint(folder), settings)
    assert runner.is_native == native, "another path than the one to be tested"
    arena = reserve_host_arena(8 * PAGE_BYTES, PAGE_BYTES)
    arena.prepare(8)
    arena.grow(8)
    arena.memory.fill_(0xFF)  # not-a-number wherever nothing was written
    runner.attach_arena(arena)
    return runner


class Sequences:
    """Token rows in slots, computed piece by piece."""

    def __init__(self, runner: CpuRunner, ids: torch.Tensor) -> None:
        self.runner, self.ids = runner, ids.to(torch.int32)
        assert runner._arena is not None
        self.arena: Arena = runner._arena
        wanted = NUM_SLOTS * MAX_POSITIONS // runner.block_size
        blocks = np.random.default_rng(0).permutation(2 * wanted).astype(np.int32)[:wanted]
        blocks = blocks.reshape(NUM_SLOTS, -1)
        self.table = self.arena.places(blocks, runner.block_bytes)

    def compute(self, pieces: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Logits of each (row, start, stop), computed in one step."""
        counts = [stop - start for _, start, stop in pieces]
        step = StepInput(
            tokens=np.concatenate([self.ids[row, start:stop].numpy() for row, start, stop in pieces]),
            positions=np.concatenate([np.arange(start, stop, dtype=np.int32) for _, start, stop in pieces]),
            query_starts=np.cumsum([0, *counts], dtype=np.int32),
            context_lengths=np.array([stop for _, _, stop in pieces], dtype=np.int32),
            slots=np.array([row for row, _, _ in pieces], dtype=np.int32),
            block_table=self.table,
            changed_slots=range(NUM_SLOTS),
            wanted_rows=np.arange(sum(counts), dtype=np.int32),
            sampled=[],
            sampled_rows=np.zeros(0, dtype=np.int32),
        )
        with torch.inference_mode():
            logits, greedy = self.runner._executor.run(step, self.arena)
        if greedy is not None:
            assert torch.equal(greedy.long(), logits.argmax(dim=-1))
        return list(torch.split(logits.clone(), counts))


@pytest.mark.parametrize(
    ("name", "native"),
    [(name, native) for name in CONFIGS for native in (True, False) if not native or name not in NOT_NATIVE],
)
def test_logits_equal_those_of_transformers(name: str, native: bool, tmp_path: Path) -> None:
    reference = save_reference(name, tmp_path)
    ids = torch.randint(0, VOCAB, (3, 200))
    sequences = Sequences(make_runner(tmp_path, native), ids)
    got = [sequences.compute([(0, 0, 70), (1, 0, 1)]), sequences.compute([(0, 70, 199), (1, 1, 99)])]
    got.append(sequences.compute([(0, 199, 200), (1, 99, 100), (2, 0, 17)]))
    with torch.inference_mode():
        expected = reference(ids).logits
    # float32 sums in another order: some thousand roundings of 6e-8 each
    for row, length in enumerate((200, 100, 17)):
        logits = torch.cat([step[row] for step in got if row < len(step)])
        torch.testing.assert_close(logits, expected[row, :length], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-uneven", "llama-uneven", "mistral"])
def test_native_logits_do_not_depend_on_the_batch(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_reference(name, tmp_path, dtype)
    ids = torch.randint(0, VOCAB, (4, 180))
    alone = Sequences(make_runner(tmp_path, native=True, dtype=dtype), ids)
    one_by_one = torch.cat([alone.compute([(0, at, at + 1)])[0] for at in range(180)])
    crowd = Sequences(make_runner(tmp_path, native=True, dtype=dtype), ids)
    parts = [
        crowd.compute([(1, 0, 30), (0, 0, 5), (2, 0, 64)])[1],
        crowd.compute([(0, 5, 141), (3, 0, 20)])[0],
        crowd.compute([(1, 30, 31), (2, 64, 90), (0, 141, 180), (3, 20, 21)])[2],
    ]
    assert torch.equal(torch.cat(parts), one_by_one)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3-uneven", "llama-uneven"])
def test_native_bfloat16_is_close_to_float32(name: str, tmp_path: Path) -> None:
    reference = save_reference(name, tmp_path, torch.bfloat16)
    ids = torch.randint(0, VOCAB, (1, 150))
    sequences = Sequences(make_runner(tmp_path, native=True, dtype=torch.bfloat16), ids)
    logits = sequences.compute([(0, 0, 150)])[0]
    with torch.inference_mode():
        expected = reference(ids).logits[0]
        rounded = reference.to(torch.bfloat16)(ids).logits[0].float()
    # no further from the float32 result than transformers' own bfloat16 is
    assert (logits - expected).square().mean() < (rounded - expected).square().mean()


@pytest.mark.parametrize("quantization", ["", "int8"])
def test_what_is_booked_for_a_step_is_enough(quantization: str, tmp_path: Path) -> None:
    save_reference("quantizable", tmp_path)
    checkpoint, architecture = Checkpoint(tmp_path), read_architecture(tmp_path)
    settings = LlmSettings(tmp_path, tmp_path, quantization=quantization, num_threads=1)
    plan = plan_llm("m", settings, architecture, checkpoint)
    runner = make_runner_of_plan(None, architecture, checkpoint, plan, lambda num_bytes: None)
    assert runner.is_native
    assert 0 < runner.workspace_bytes <= plan.workspace_bytes < 4 * runner.workspace_bytes


def test_kept_generation_is_sampled_greedily(tmp_path: Path) -> None:
    reference = save_reference("llama", tmp_path)
    ids = torch.randint(0, VOCAB, (1, 20))
    sequences = Sequences(make_runner(tmp_path, native=True), ids)
    generation = Generation("a", array("i", ids[0].tolist()), 20, SamplingParameters(temperature=0), max_total=30)
    step = StepInput(
        tokens=ids[0].to(torch.int32).numpy(),
        positions=np.arange(20, dtype=np.int32),
        query_starts=np.array([0, 20], dtype=np.int32),
        context_lengths=np.array([20], dtype=np.int32),
        slots=np.zeros(1, dtype=np.int32),
        block_table=sequences.table,
        changed_slots=[0],
        wanted_rows=np.array([19], dtype=np.int32),
        sampled=[generation],
        sampled_rows=np.zeros(1, dtype=np.int32),
    )
    output = sequences.runner.run(step)
    with torch.inference_mode():
        assert output.token_ids == [int(reference(ids).logits[0, -1].argmax())]
