"""One request, one answer: what a front end does around `core.submit`, whatever the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from enginehouse.core import Core
from enginehouse.errors import Internal
from enginehouse.types import InferRequest, InferResponse


async def infer_once(core: Core, request: InferRequest) -> InferResponse:
    """The answer, with the model's error in `error`. Raises only what `submit` refused the request with.

    Cancelling the task cancels the request.
    """
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    answers: list[InferResponse] = []

    def sink(response: InferResponse) -> None:
        if response.has_response or response.error is not None:
            answers.append(response)
        if response.final and not done.done():
            done.set_result(None)

    request.sink = sink
    core.submit(request)
    try:
        await done
    except asyncio.CancelledError:
        request.cancel()
        raise
    if not answers:
        return InferResponse(error=Internal(f"model '{request.model_name}' gave no response"))
    return answers[0]


class AnswerStream:
    """The answers to a submitted request, the bare final flag included, in order.

    Leaving the iteration early, or `close`, cancels the request.
    """

    def __init__(self, request: InferRequest) -> None:
        self._request = request
        self._waiting: asyncio.Queue[InferResponse] = asyncio.Queue()
        self._ended = False
        request.sink = self._waiting.put_nowait

    async def __aiter__(self) -> AsyncIterator[InferResponse]:
        try:
            while not self._ended:
                response = await self._waiting.get()
                self._ended = response.final
                yield response
        finally:
            self.close()

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._request.cancel()
