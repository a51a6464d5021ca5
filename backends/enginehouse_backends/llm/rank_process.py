"""The program of ranks 1 … of a tensor-parallel engine: does what rank 0 orders, on its share of each LLM.

    python -m enginehouse_backends.llm.rank_process <descriptor> <device> <rank> <world size> <port>
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from enginehouse.errors import EnginehouseError, Internal
from enginehouse_backends.llm.architecture import read_architecture
from enginehouse_backends.llm.arena import DeviceArena
from enginehouse_backends.llm.checkpoints import open_checkpoint
from enginehouse_backends.llm.llm_settings import LlmSettings
from enginehouse_backends.llm.parallel_group import find_store, join_group
from enginehouse_backends.llm.planning import LlmPlan
from enginehouse_backends.llm.ranks import Order, StepOrder
from enginehouse_backends.llm.runner import IntArray, Runner, RunningStep
from enginehouse_backends.llm.runners import make_arena, make_runner, make_runtime

logger = logging.getLogger(__name__)


@dataclass
class _Share:
    """One LLM's here."""

    runner: Runner
    table: IntArray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int32))
    running: deque[RunningStep] = field(default_factory=deque)


class RankProcess:
    """See module. Orders are carried out in the order in which they come, but for loading."""

    def __init__(self, pipe: Connection[Any, Order], device: str, rank: int, world_size: int, port: int) -> None:
        self._pipe, self._lock = pipe, threading.Lock()
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="orders", daemon=True).start()
        self._runtime = make_runtime(device)
        self._arena = make_arena(self._runtime)
        self._shares: dict[str, _Share] = {}
        self._unwanted: set[str] = set()
        """Given up by rank 0 before they were here. The lock guards both while threads load."""
        self._group = join_group(device, rank, world_size, find_store(port, world_size))
        # collectives order what two steps do, so a second one may wait in a real device's stream
        self._unfinished = 1 if device.startswith("cuda") else 0

    def _listen(self) -> None:
        try:
            while True:
                self._orders.put(self._pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # rank 0 has gone, whatever this one is waiting for

    def serve(self) -> None:
        while True:
            order = self._orders.get()
            if order.what == "leave":
                return
            if order.what == "load":
                threading.Thread(target=self._load, args=(order,), name="load", daemon=True).start()
            else:
                self._do(order)

    def _load(self, order: Order) -> None:
        try:
            runner = self._load_runner(*order.arguments)
        except Exception as error:
            logger.exception("loading failed")
            self._answer(order, error if isinstance(error, EnginehouseError) else Internal(repr(error)))
            return
        with self._lock:
            is_wanted = order.key not in self._unwanted
            if is_wanted:
                self._shares[order.key] = _Share(runner)
        if not is_wanted:
            runner.close()
        self._answer(order, None)

    def _load_runner(self, settings: LlmSettings, plan: LlmPlan) -> Runner:
        checkpoint = open_checkpoint(settings, None if self._runtime is None else self._runtime.device)
        try:
            architecture = read_architecture(settings.folder)
            return make_runner(self._runtime, architecture, checkpoint, plan, lambda num_bytes: None, self._group)
        finally:
            checkpoint.close()

    def _answer(self, order: Order, error: EnginehouseError | None) -> None:
        with self._lock:
            self._pipe.send((order.key, error))

    def _do(self, order: Order) -> None:
        with self._lock:
            share = self._shares.get(order.key)
            if share is None and order.what == "close":
                self._unwanted.add(order.key)  # it may still be loading here
        if share is None:
            return  # it could not be loaded, and rank 0 gives up, too
        if order.what != "step":
            self._finish(share, 0)
        match order.what:
            case "step":
                self._step(share, order.arguments)
            case "attach":
                self._attach(share, order.arguments)
                self._answer(order, None)
            case "detach":
                share.runner.detach_arena()
            case "copy":
                share.runner.copy_blocks(*order.arguments)
            case "close":
                del self._shares[order.key]
                share.runner.close()

    def _attach(self, share: _Share, num_pages: int) -> None:
        arena = self._arena
        if not isinstance(arena, DeviceArena):
            arena.prepare(max(num_pages, arena.num_pages))
            arena.grow(num_pages)
        elif arena.num_pages != num_pages:
            arena.resize(num_pages)
        share.runner.attach_arena(arena)

    def _step(self, share: _Share, order: StepOrder) -> None:
        step = order.step
        if share.table.shape != order.table_shape:
            share.table = np.zeros(order.table_shape, dtype=np.int32)
        if len(step.changed_slots):
            share.table[list(step.changed_slots)] = step.block_table
        self._finish(share, 1)
        share.running.append(share.runner.start(replace(step, block_table=share.table)))
        self._finish(share, self._unfinished)

    @staticmethod
    def _finish(share: _Share, most: int) -> None:
        while len(share.running) > most:
            share.running.popleft().finish()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    descriptor, device, rank, world_size, port = sys.argv[1:]
    pipe: Connection[Any, Order] = Connection(int(descriptor))
    process = RankProcess(pipe, device, int(rank), int(world_size), int(port))
    try:
        process.serve()
        os._exit(0)  # threads of torch may wait for ever
    except BaseException:
        logger.critical("rank %s failed", rank, exc_info=True)
        os._exit(1)


if __name__ == "__main__":
    main()
