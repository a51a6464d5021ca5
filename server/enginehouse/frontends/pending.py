"""A result that comes by callback: for what is asked thousands of times a second, instead of a task each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Pending(Generic[T]):
    """Who makes it calls `resolve` once. Who gets it calls `then` once, or awaits it: an Exception is raised then.

    `leave` says that nobody waits any more; a subclass stops its work then. It may still call `resolve`.
    """

    __slots__ = ("_result", "_take")

    def __init__(self) -> None:
        self._take: Callable[[T | Exception], None] | None = None
        self._result: T | Exception | None = None

    def then(self, take: Callable[[T | Exception], None]) -> None:
        """Calls `take` at once if the result is there."""
        if self._result is not None:
            take(self._result)
        else:
            self._take = take

    def resolve(self, result: T | Exception) -> None:
        if self._take is not None:
            self._take(result)
        else:
            self._result = result

    def leave(self) -> None:
        """Nobody waits for the result any more."""

    def __await__(self) -> Generator[Any, None, T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def take(result: T | Exception) -> None:
            if future.done():
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        self.then(take)
        try:
            return (yield from future)
        except asyncio.CancelledError:
            self.leave()
            raise


def close_with(task: asyncio.Task[Any], inner: Awaitable[Any]) -> None:
    """For a task that awaits a coroutine made before it: cancelled before its first step, it never would."""
    if isinstance(inner, Coroutine):
        task.add_done_callback(lambda _: inner.close())
