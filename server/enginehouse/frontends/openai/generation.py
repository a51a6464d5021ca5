"""The sequences behind one request: submitted together, cancelled together, each ending once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from enginehouse.core import Core
from enginehouse.errors import EnginehouseError
from enginehouse.types import GenerateRequest, TokenEvent

OnEvent = Callable[[int, TokenEvent], None]


class Generation:
    """`on_event` gets each event with its sequence's index, on the loop."""

    def __init__(self, core: Core, requests: Sequence[GenerateRequest], on_event: OnEvent) -> None:
        self._core = core
        self._requests = requests
        self._on_event = on_event
        self._open: set[int] = set()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def start(self) -> None:
        """Raises what the engine refuses a sequence with; then none of them runs."""
        try:
            for index, request in enumerate(self._requests):
                self._core.generate(request, self._emit_of(index))
                self._open.add(index)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Nobody wants the rest: events that still come are dropped."""
        for index in self._open:
            request = self._requests[index]
            with suppress(EnginehouseError):  # an engine that is gone has nothing left to cancel
                self._core.cancel_generate(request.model_name, request.id)
        self._open.clear()

    def _emit_of(self, index: int) -> Callable[[TokenEvent], None]:
        opened, on_event = self._open, self._on_event

        def emit(event: TokenEvent) -> None:
            if index not in opened:
                return
            if event.finish_reason is not None or event.error is not None:
                opened.discard(index)
            on_event(index, event)

        return emit


async def run(core: Core, requests: Sequence[GenerateRequest]) -> list[TokenEvent]:
    """The last event of each sequence, all of whose text is in it. Raises the first error.

    Cancelling the task cancels the sequences.
    """
    last: list[TokenEvent | None] = [None] * len(requests)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    problem: list[EnginehouseError] = []

    def on_event(index: int, event: TokenEvent) -> None:
        last[index] = event
        if event.error is not None:
            problem.append(event.error)
        if (problem or not generation.num_open) and not done.done():
            done.set_result(None)

    generation = Generation(core, requests, on_event)
    generation.start()
    try:
        await done
    finally:
        generation.cancel()
    if problem:
        raise problem[0]
    assert all(event is not None for event in last), "a sequence without a last event: a bug"
    return [event for event in last if event is not None]
