"""Questions to a worker that wait for its replies. On the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from enginehouse.errors import Unavailable
from enginehouse.execution import messages as m


class NoAnswer(Unavailable):
    """To a call: the worker ended, or took too long."""


class OpenCalls:
    """Every call ends with a reply, its error, or NoAnswer."""

    def __init__(self) -> None:
        self._replies: dict[int, asyncio.Future[Any]] = {}

    async def ask(self, call_id: int, send: Callable[[], None], what: str, timeout_s: float | None) -> Any:
        """The reply's value. Raises the reply's error, or NoAnswer."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies[call_id] = reply
        try:
            send()
            return await asyncio.wait_for(reply, timeout_s)
        except TimeoutError:
            raise NoAnswer(f"{what} did not answer within {timeout_s:g} s") from None
        finally:
            self._replies.pop(call_id, None)

    def on_reply(self, reply: m.Reply) -> None:
        future = self._replies.get(reply.call_id)
        if future is None or future.done():
            return
        if reply.error is not None:
            future.set_exception(reply.error.error())
        else:
            future.set_result(reply.value)

    def fail_all(self, reason: str) -> None:
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(NoAnswer(reason))
