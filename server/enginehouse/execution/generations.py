"""The sequences that an engine generates at the moment, and who gets their events. On the loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from enginehouse.errors import EnginehouseError, Internal
from enginehouse.types import TokenEvent

logger = logging.getLogger("enginehouse.execution")

Emit = Callable[[TokenEvent], None]


class Generations:
    """Every sequence gets one last event, with a finish reason or an error; what comes later is dropped."""

    def __init__(self) -> None:
        self.num_events = 0
        self._emit_by_request: dict[str, Emit] = {}
        self._none_open = asyncio.Event()
        self._none_open.set()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._emit_by_request

    def open(self, request_id: str, emit: Emit) -> None:
        self._emit_by_request[request_id] = emit
        self._none_open.clear()

    def forget(self, request_id: str) -> None:
        """The engine refused it and the caller knows."""
        self._emit_by_request.pop(request_id, None)
        if not self._emit_by_request:
            self._none_open.set()

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        self.num_events += len(events)
        for event in events:
            emit = self._emit_by_request.get(event.request_id)
            if emit is None:
                continue
            if event.finish_reason is not None or event.error is not None:
                self.forget(event.request_id)
            if not _takes(emit, event):
                # of one client's: the events of the others in this message are not to be lost
                _takes(emit, TokenEvent(event.request_id, error=Internal("what was generated can't be told")))
                self.forget(event.request_id)

    def fail_all(self, error: EnginehouseError) -> None:
        for request_id in list(self._emit_by_request):
            self.on_events([TokenEvent(request_id, error=error)])

    async def ended(self) -> None:
        """Returns when none is open."""
        await self._none_open.wait()


def _takes(emit: Emit, event: TokenEvent) -> bool:
    try:
        emit(event)
    except Exception:
        logger.exception("an event of generation '%s' could not be handed on", event.request_id)
        return False
    return True
