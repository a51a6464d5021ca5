"""Traces of requests as the front ends see them: when a request came in, when its answer went out.

Costs one look at a flag where tracing is off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from enginehouse.core import Core
from enginehouse.types import InferRequest


class RequestTraces:
    """`protocol` is HTTP or GRPC; it begins the names of the stamps as Triton's traces have them."""

    def __init__(self, core: Core, protocol: str) -> None:
        self._tracing = core.tracing
        grpc = protocol == "GRPC"
        self._received = ("GRPC_WAITREAD_START", "GRPC_WAITREAD_END") if grpc else (
            "HTTP_RECV_START", "HTTP_RECV_END",
        )  # fmt: skip
        self._sending = f"{protocol}_SEND_START"
        self._sent = f"{protocol}_SEND_END"

    @property
    def is_on(self) -> bool:
        return self._tracing is not None and bool(self._tracing.enabled)

    def begin(self, request: InferRequest, headers: Iterable[tuple[str, str]]) -> None:
        """Before `submit`: gives the request a trace if it is one of those to trace."""
        if not self.is_on:
            return
        lowered = {name.lower(): value for name, value in headers}
        request.trace = self._tracing.sample(request.model_name, lowered)
        if request.trace is not None:
            for name in self._received:
                request.trace.stamp(name, request.times.received_ns)

    def abandon(self, request: InferRequest) -> None:
        """The request was refused or its client has gone: nothing more will be stamped."""
        if request.trace is not None:
            request.trace.finish()

    def sending(self, request: InferRequest) -> Callable[[], None] | None:
        """Before the answer is written; what comes back is to be called when it is."""
        if request.trace is None:
            return None
        trace = request.trace
        trace.stamp(self._sending, time.monotonic_ns())

        def sent() -> None:
            trace.stamp(self._sent, time.monotonic_ns())
            trace.finish()

        return sent
