"""Waiting for work to end as long as it shows signs of life."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Progress:
    """Counts what a model's instances give back: a number that stands still for long is a hang."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    async def look(self) -> int:
        """As a sign of life."""
        return self.count


async def ends_in_time(
    work: Awaitable[object], sign_of_life: Callable[[], Awaitable[object]], patience_s: float
) -> bool:
    """Whether `work` ended. It is given up, and cancelled, when `sign_of_life` has stayed the same for so long.

    Raises what the work raises.
    """
    task = asyncio.ensure_future(work)
    try:
        seen = await sign_of_life()
        while True:
            done, _ = await asyncio.wait([task], timeout=patience_s)
            if done:
                task.result()
                return True
            last, seen = seen, await sign_of_life()
            if seen == last:
                return False
    finally:
        task.cancel()
