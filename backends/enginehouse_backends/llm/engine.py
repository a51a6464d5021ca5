"""The engine: one thread that drains its inbox, lets each LLM take a step, and pushes tokens.

Several LLMs share the arena's pages. All their state belongs to this thread; others put work into the inbox.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import numpy as np

from enginehouse.errors import Internal, ResourceExhausted, Unavailable
from enginehouse_backends.llm.answering import Answer
from enginehouse_backends.llm.arena import Arena, DeviceArena
from enginehouse_backends.llm.kv_space import KvSpace
from enginehouse_backends.llm.page_ledger import PageLedger
from enginehouse_backends.llm.scheduler import StepPlan
from enginehouse_backends.llm.served_llm import ServedLlm

logger = logging.getLogger(__name__)

_IDLE_S = 1.0
"""After so long without work the books are checked, once."""
T = TypeVar("T")


class Engine:
    """See module. Made by the first LLM of an engine group, stopped by the last."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.space = KvSpace(PageLedger(arena.num_pages))
        self._llms: dict[str, ServedLlm] = {}
        self._pages_by_llm: dict[str, int] = {}
        """What the arena grew by for each."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._joining = threading.Lock()
        """Held by the one for whom the arena grows."""
        self._stopped = False
        self._broken = ""
        """What check_integrity found: nothing more is accepted."""
        self.num_checks = 0
        self._thread = threading.Thread(target=self._work, name="llm engine", daemon=True)
        self._thread.start()

    # --- from any thread
    def submit(self, llm: ServedLlm, answer: Answer) -> None:
        self._inbox.put(lambda: self._add(llm, answer))

    def cancel(self, llm: ServedLlm, request_id: str) -> None:
        self._inbox.put(lambda: llm.cancel(request_id))

    def call(self, work: Callable[[], T]) -> T:
        """Runs `work` in the engine's thread between two steps, and waits for it."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(run)
        return future.result()

    def join(self, llm: ServedLlm, num_pages: int, weight: float) -> None:
        """The LLM takes part from now on; the arena grows by so many pages for it. The others go on meanwhile.

        Raises ResourceExhausted if the device lacks the memory; nothing has changed then.
        """

        def act() -> None:
            self._resize(self.arena.num_pages + num_pages)
            self._pages_by_llm[llm.name] = num_pages
            self.space.join(llm.name, llm.scheduler.pool, weight)
            try:
                llm.runner.attach_arena(self.arena)
            except BaseException:
                self._take_away(llm)
                raise
            self._llms[llm.name] = llm
            self._tell_shares()

        with self._joining:
            self.arena.prepare(self.arena.num_pages + num_pages)
            self.call(act)

    def leave(self, llm: ServedLlm) -> None:
        """Fails what it still has; its pages are the others' from now on."""

        def act() -> None:
            llm.fail_all(Unavailable(f"model '{llm.model_name}' is being unloaded"))
            llm.settle()
            if self._llms.pop(llm.name, None) is not None:
                self._take_away(llm)
            self._tell_shares()

        self.call(act)

    def _take_away(self, llm: ServedLlm) -> None:
        self.space.leave(llm.name)
        llm.runner.detach_arena()
        num_pages = self._pages_by_llm.pop(llm.name)
        if not self.arena.keeps_content:  # what the ledger has back the device shall have back
            self._resize(self.arena.num_pages - num_pages)

    def _resize(self, num_pages: int) -> None:
        arena = self.arena
        if not isinstance(arena, DeviceArena):
            arena.grow(num_pages)
            self.space.ledger.grow(num_pages)
            return
        before, llms = arena.num_pages, list(self._llms.values())
        for llm in llms:
            llm.vacate()
            self.space.vacate(llm.name)
            llm.runner.detach_arena()
        try:
            arena.resize(num_pages)
        except ResourceExhausted:
            arena.resize(before)
            raise
        finally:
            self.space.ledger.resize(arena.num_pages)
            for llm in llms:
                llm.runner.attach_arena(arena)

    def stop(self) -> None:
        self._inbox.put(self._stop)
        self._thread.join()

    # --- the thread
    def _work(self) -> None:
        checked = False
        while not self._stopped:
            if not self._drain_inbox(wait_s=None if checked else _IDLE_S):
                self._check_when_idle()
                checked = True
                continue
            checked = False
            while not self._stopped and self._step_all():
                self._drain_inbox(wait_s=0)

    def _drain_inbox(self, wait_s: float | None) -> bool:
        """Does what others have asked for; waits so long (None: for ever) for the first. False if none came."""
        came = False
        try:
            work = self._inbox.get_nowait() if wait_s == 0 else self._inbox.get(timeout=wait_s)
            while True:
                came = True
                try:
                    work()
                except Exception:
                    logger.exception("the engine failed to take in a request")
                work = self._inbox.get_nowait()
        except queue.Empty:
            return came

    def _step_all(self) -> bool:
        """One step of each LLM that has work. False if none has."""
        busy = [llm for llm in self._llms.values() if llm.has_work]
        for llm in busy:
            llm.scheduler.prompts.others_wait = len(busy) > 1
            try:
                plan = llm.step()
                if plan.starved is not None or not (plan.shares or plan.preempted or plan.waits_for_step):
                    self._make_way(llm, plan)
            except Exception as error:  # a bug of ours: this LLM's requests fail, the others go on
                logger.exception("the engine failed in a step of model '%s'", llm.name)
                llm.fail_all(Internal(f"the engine failed: {error!r}"))
        return bool(busy)

    def _make_way(self, llm: ServedLlm, plan: StepPlan) -> None:
        """The LLM has work and no blocks for it: a page of another one, if its share says so."""
        if not llm.has_work:
            return
        donor = self.space.busy_donor(llm.name)
        if donor is not None:
            self._take_page_of(self._llms[donor])
        elif not any(other.has_work for other in self._llms.values() if other is not llm):
            waiting = plan.starved or next(iter(llm.scheduler.waiting.in_order()), None)
            if waiting is not None and not llm.scheduler.running:
                llm.starve(waiting)

    def _take_page_of(self, donor: ServedLlm) -> None:
        emptied = donor.scheduler.empty_page()
        assert emptied is not None, "bug: a model above its share has no page"
        page, moves = emptied
        if moves:
            sources, targets = zip(*moves, strict=True)
            blocks = np.array([sources, targets], dtype=np.int32)
            places = self.arena.places(blocks, donor.runner.block_bytes)
            donor.runner.copy_blocks(places[0], places[1])
        self.space.give_up(donor.name, page)

    def _check_when_idle(self) -> None:
        try:
            self.check_integrity()
        except AssertionError as error:
            logger.critical("the engine's books are wrong, it takes no more requests: %s", error)
            self._broken = str(error)

    def check_integrity(self) -> None:
        """Raises AssertionError if blocks, pages or slots are lost."""
        self.num_checks += 1
        self.space.check_integrity()
        for llm in self._llms.values():
            llm.scheduler.check_integrity()
            llm.refresh_gauges()

    def _add(self, llm: ServedLlm, answer: Answer) -> None:
        if self._broken:
            llm.refuse(answer, Internal(f"the engine's books are wrong ({self._broken}): load the model again"))
        elif llm.name not in self._llms:
            llm.refuse(answer, Unavailable(f"model '{llm.model_name}' is being unloaded"))
        else:
            llm.add(answer)

    def _tell_shares(self) -> None:
        for llm in self._llms.values():
            llm.most_tokens = self.space.guaranteed_blocks(llm.name) * llm.scheduler.limits.block_size

    def _stop(self) -> None:
        for llm in list(self._llms.values()):
            llm.fail_all(Unavailable("the engine is being stopped"))
        self._stopped = True
