"""One request, one answer: what a front end does around `core.submit`, whatever the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from enginehouse.core import Core, ServedVersion
from enginehouse.errors import Internal
from enginehouse.frontends.output_options import OutputOptions
from enginehouse.frontends.pending import Pending
from enginehouse.frontends.request_traces import RequestTraces
from enginehouse.types import InferRequest, InferResponse

T = TypeVar("T")


class Exchange(Pending[T]):
    """One request and its one answer, without a task. A subclass makes the answer that its protocol sends."""

    __slots__ = ("_answer", "_has_left", "_traces", "options", "request", "served")

    def __init__(
        self, request: InferRequest, options: OutputOptions, served: ServedVersion, traces: RequestTraces
    ) -> None:
        super().__init__()
        self.request = request
        self.options = options
        self.served = served
        self._traces = traces
        self._answer: InferResponse | None = None
        self._has_left = False

    def encode(self, response: InferResponse) -> T:
        """Raises what the client shall be told. `response.error` is None."""
        raise NotImplementedError

    def failed(self, error: Exception) -> T | Exception:
        """What the client gets instead of an answer, where the model failed or its answer can't be encoded."""
        return error

    def submit(self, core: Core) -> None:
        """Raises what the core refuses the request with; then `refuse` is to be called."""
        self.request.sink = self._take_response
        core.submit_for_client(self.request)

    def refuse(self, result: T | Exception) -> None:
        """The request can't be submitted; the client gets that."""
        self._end()
        self.resolve(result)

    def leave(self) -> None:
        self._has_left = True
        self.request.cancel()

    def _take_response(self, response: InferResponse) -> None:
        if self._answer is None and (response.has_response or response.error is not None):
            self._answer = response
        if not response.final:
            return
        if self._has_left:
            self._end()
            return
        self.resolve(self._outcome())

    def _outcome(self) -> T | Exception:
        answer = self._answer
        try:
            if answer is None:
                raise Internal(f"model '{self.request.model_name}' gave no response")
            if answer.error is not None:
                raise answer.error
            return self.encode(answer)
        except Exception as error:
            return self.failed(error)
        finally:
            if self.options.leases:
                self.options.release()

    def _end(self) -> None:
        self.options.release()
        self._traces.abandon(self.request)


class AnswerStream:
    """The answers to a submitted request, the bare final flag included, in order.

    Leaving the iteration early, or `close`, cancels the request.
    """

    def __init__(self, request: InferRequest) -> None:
        self._request = request
        self._waiting: asyncio.Queue[InferResponse] = asyncio.Queue()
        self._ended = False
        request.sink = self._take

    def _take(self, response: InferResponse) -> None:
        if not self._ended:  # a model may go on answering a client that has left
            self._waiting.put_nowait(response)

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
            while not self._waiting.empty():
                self._waiting.get_nowait()
