"""Keeps a worker that completed a config for the load that usually follows at once."""

from __future__ import annotations

import asyncio

from enginehouse.execution.process_host import HostProcess

PARKING_S = 10.0


class Parking:
    """Processes without a tenant, by model directory and version. They end if nobody comes for them."""

    def __init__(self) -> None:
        self._parked: dict[tuple[str, int], tuple[HostProcess, asyncio.TimerHandle]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def park(self, key: tuple[str, int], process: HostProcess) -> None:
        earlier = self.take(key)
        if earlier is not None:
            await earlier.close()
        timer = asyncio.get_running_loop().call_later(PARKING_S, self._expire, key)
        self._parked[key] = (process, timer)

    def take(self, key: tuple[str, int]) -> HostProcess | None:
        """The process, which is the caller's from now on."""
        process, timer = self._parked.pop(key, (None, None))
        if timer is not None:
            timer.cancel()
        return process

    def _expire(self, key: tuple[str, int]) -> None:
        process = self.take(key)
        if process is not None:
            self.end(process)

    def end(self, process: HostProcess) -> None:
        """Ends one that nobody wants after all, without waiting for it."""
        task = asyncio.get_running_loop().create_task(process.close())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        for key in list(self._parked):
            process = self.take(key)
            assert process is not None, "taken by key"
            await process.close()
        await asyncio.gather(*self._ending)
