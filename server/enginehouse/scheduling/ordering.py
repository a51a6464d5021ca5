"""Answers in the order of the requests: `preserve_ordering`. No I/O and no clock here.

The oldest request's answers pass at once; those of younger ones wait for its final one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from enginehouse.types import InferRequest, InferResponse


class ResponseOrder:
    """`open` requests in order, give `respond` their answers in any order, `deliver` gets them sorted."""

    def __init__(self, deliver: Callable[[InferRequest, InferResponse], None]) -> None:
        self._deliver = deliver
        self._line: deque[InferRequest] = deque()
        self._held: dict[InferRequest, list[InferResponse]] = {}

    def open(self, request: InferRequest) -> None:
        self._line.append(request)
        self._held[request] = []

    def respond(self, request: InferRequest, response: InferResponse) -> None:
        if request is not self._line[0]:
            self._held[request].append(response)
            return
        self._pass_on(request, response)
        while self._line and (held := self._held[self._line[0]]):
            self._pass_on(self._line[0], held.pop(0))

    def _pass_on(self, request: InferRequest, response: InferResponse) -> None:
        if response.final:
            del self._held[self._line.popleft()]
        self._deliver(request, response)
