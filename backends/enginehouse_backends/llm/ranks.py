"""The ranks of a tensor-parallel engine as rank 0 sees them: processes that run the same steps on their shares.

Rank 0 is the engine's own process. Before it runs a step it tells the others; their collectives meet. They sample the
same tokens by themselves, so nothing comes back but word of loading. A rank that dies takes the engine's process along:
what the others wait for would never come, and the server starts the process again.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

from enginehouse.types import SamplingParameters
from enginehouse_backends.llm.arena import Arena
from enginehouse_backends.llm.device_sampling import is_for_host
from enginehouse_backends.llm.generation import Generation
from enginehouse_backends.llm.llm_settings import LlmSettings
from enginehouse_backends.llm.parallel_group import ParallelGroup, join_group, leave_group, make_store
from enginehouse_backends.llm.planning import LlmPlan
from enginehouse_backends.llm.runner import IntArray, Runner, RunningStep, StepInput, StepOutput

logger = logging.getLogger(__name__)

_DEAD_RANK_STATUS = 70
_PATIENCE_S = 30.0
"""For a rank that leaves."""


@dataclass(frozen=True, slots=True)
class Order:
    """What another rank is to do: load, attach, detach, step, copy or close, for the LLM `key`; or leave."""

    what: str
    key: str = ""
    arguments: Any = None


@dataclass(frozen=True, slots=True)
class StepOrder:
    """A step without what only rank 0 needs. `step.block_table` holds the changed rows alone."""

    step: StepInput
    table_shape: tuple[int, int]


class Ranks:
    """Ranks 1 … of one engine, started with it. `group` is rank 0's part."""

    def __init__(self, devices: Sequence[str]) -> None:
        """devices: of all ranks, this process's first. Returns when all have met."""
        self.size = len(devices)
        self._lock = threading.Lock()
        self._is_closing = False
        self._answers: dict[tuple[int, str], Future[None]] = {}
        store = make_store(self.size)
        self._pipes: list[Connection[Order, Any]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank, device in enumerate(devices[1:], start=1):
            self._start(rank, device, store.port)
        self.group: ParallelGroup = join_group(devices[0], 0, self.size, store)

    def _start(self, rank: int, device: str, port: int) -> None:
        ours, theirs = Pipe()
        descriptor = theirs.fileno()
        program = ("-m", "enginehouse_backends.llm.rank_process")
        arguments = (str(descriptor), device, str(rank), str(self.size), str(port))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen((sys.executable, *program, *arguments), pass_fds=(descriptor,), env=environment)
        theirs.close()
        self._pipes.append(ours)
        self._processes.append(process)
        threading.Thread(target=self._listen, args=(rank, ours), name=f"rank {rank}", daemon=True).start()

    def _listen(self, rank: int, pipe: Connection[Order, Any]) -> None:
        while True:
            try:
                key, error = pipe.recv()
            except (EOFError, OSError):
                break
            answer = self._answers.pop((rank, key))
            if error is None:
                answer.set_result(None)
            else:
                answer.set_exception(error)
        if not self._is_closing:
            logger.critical("rank %d of %d has ended: the engine's process ends, too", rank, self.size)
            os._exit(_DEAD_RANK_STATUS)

    def tell(self, order: Order) -> None:
        with self._lock:  # the engine's thread and those that load
            for pipe in self._pipes:
                pipe.send(order)

    def ask(self, order: Order) -> list[Future[None]]:
        """One answer each."""
        answers: list[Future[None]] = []
        for rank in range(1, self.size):
            answers.append(Future())
            self._answers[rank, order.key] = answers[-1]
        self.tell(order)
        return answers

    def close(self) -> None:
        self._is_closing = True
        self.tell(Order("leave"))
        for process in self._processes:
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                logger.error("a rank hangs while it leaves: it is ended")
                process.kill()
                process.wait()
        for pipe in self._pipes:
            pipe.close()
        leave_group()


class ParallelRunner(Runner):
    """Rank 0's runner, and word to the others."""

    def __init__(self, ranks: Ranks, key: str, own: Runner) -> None:
        self._ranks, self._key, self._own = ranks, key, own
        self.is_asynchronous, self.pooling = own.is_asynchronous, own.pooling
        self.max_wanted, self.block_size = own.max_wanted, own.block_size
        self.weight_bytes, self.workspace_bytes = own.weight_bytes, own.workspace_bytes

    @property
    def block_bytes(self) -> int:
        return self._own.block_bytes

    def attach_arena(self, arena: Arena) -> None:
        answers = self._ranks.ask(Order("attach", self._key, arena.num_pages))
        self._own.attach_arena(arena)
        for answer in answers:
            answer.result()
        self.workspace_bytes = self._own.workspace_bytes

    def detach_arena(self) -> None:
        self._ranks.tell(Order("detach", self._key))
        self._own.detach_arena()

    def run(self, step: StepInput) -> StepOutput:
        return self.start(step).finish()

    def start(self, step: StepInput) -> RunningStep:
        self._ranks.tell(Order("step", self._key, order_of(step)))
        return self._own.start(step)

    def copy_blocks(self, source_places: IntArray, target_places: IntArray) -> None:
        self._ranks.tell(Order("copy", self._key, (source_places, target_places)))
        self._own.copy_blocks(source_places, target_places)

    def close(self) -> None:
        self._ranks.tell(Order("close", self._key))
        self._own.close()


def load_on_ranks(ranks: Ranks, key: str, settings: LlmSettings, plan: LlmPlan) -> list[Future[None]]:
    """Has every other rank load its share of the LLM."""
    return ranks.ask(Order("load", key, (settings, plan)))


def order_of(step: StepInput) -> StepOrder:
    changed = list(step.changed_slots)
    rows = step.block_table[changed] if changed else np.zeros((0, step.block_table.shape[1]), dtype=np.int32)
    sampled = [_for_ranks(generation) for generation in step.sampled]
    shape = (step.block_table.shape[0], step.block_table.shape[1])
    return StepOrder(replace(step, block_table=rows, changed_slots=changed, sampled=sampled, followed=()), shape)


def _for_ranks(generation: Generation) -> Generation:
    """What choosing its token on a device needs; where the host chooses, any token will do."""
    given = generation.sampling
    sampling = SamplingParameters(temperature=0.0)
    if not is_for_host(generation):
        sampling = SamplingParameters(
            temperature=given.temperature, top_k=given.top_k, top_p=given.top_p, min_p=given.min_p
        )
    # only how many tokens it has put out counts
    num_output = generation.num_output + generation.num_unseen
    return Generation(generation.id, generation.tokens[:0], -num_output, sampling, 0, seed=generation.seed)
