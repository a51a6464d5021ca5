"""Follows the repositories in control mode poll: what changed is loaded once it has come to rest.

Local folders are watched (watchfiles); a folder counts as settled when nothing in it changed for the settle
time, so that a half-copied model is never loaded. What can't be watched is looked at now and then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from watchfiles import awatch

from enginehouse.errors import EnginehouseError
from enginehouse.repository.lifecycle import Lifecycle

logger = logging.getLogger("enginehouse.repository")


async def follow(roots: Sequence[Path], lifecycle: Lifecycle, *, settle_s: float, poll_s: float) -> None:
    """Runs until cancelled. `poll_s`: between looks that no change asked for."""
    changes = _changes(roots)
    waiting = asyncio.ensure_future(anext(changes))
    try:
        while True:
            done, _ = await asyncio.wait([waiting], timeout=poll_s)
            while done:
                waiting = asyncio.ensure_future(anext(changes))
                done, _ = await asyncio.wait([waiting], timeout=settle_s)
            await _refresh(lifecycle)
    finally:
        waiting.cancel()


async def _refresh(lifecycle: Lifecycle) -> None:
    try:
        await lifecycle.refresh()
    except (OSError, EnginehouseError) as error:
        logger.error("the repository can't be read, trying again later: %s", error)


async def _changes(roots: Sequence[Path]) -> AsyncIterator[None]:
    if not roots:
        await asyncio.Event().wait()  # nothing here can be watched
    async for _ in awatch(*roots, step=50, debounce=200, recursive=True):
        yield None
