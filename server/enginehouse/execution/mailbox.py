"""Hands results from threads to the event loop, waking it only when it isn't already on its way."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any


class Mailbox:
    """`post` from any thread; the posted calls run on the loop in the order of posting."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._waking = False

    def post(self, call: Callable[..., None], *arguments: Any) -> None:
        self._items.append((call, arguments))
        # Appended before the look: whoever sees True knows that the drain it announces is still to start.
        if not self._waking:
            self._waking = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:
                if not self._loop.is_closed():
                    raise  # a closed loop has nobody left to tell

    def _drain(self) -> None:
        self._waking = False
        items = self._items
        for _ in range(len(items)):
            call, arguments = items.popleft()
            call(*arguments)
        if items and not self._waking:
            self._waking = True
            self._loop.call_soon(self._drain)
