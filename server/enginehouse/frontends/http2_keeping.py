"""How long a gRPC connection lives, and how often it may be pinged: what gRPC calls keep-alive.

Triton's flags by their names, with gRPC's meaning (grpc/doc/keepalive.md): we ping clients that are silent, close
connections that don't answer or are too old, and cut off clients that ping too often. No frames are made here.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Protocol

from enginehouse.options import ServerOptions

_IDLE_PING_INTERVAL_S = 7200.0
"""Between the pings of a client without calls, unless they are permitted."""
_AGE_SPREAD = 0.1
"""Connections that began together shall not end together."""


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Of a whole server. 0 is no bound."""

    time_s: float
    timeout_s: float
    without_calls: bool
    max_pings_without_data: int
    min_ping_interval_s: float
    max_strikes: int
    max_age_s: float
    max_age_grace_s: float

    @classmethod
    def of(cls, options: ServerOptions) -> KeepAlive:
        return cls(
            options.grpc_keepalive_time / 1000,
            options.grpc_keepalive_timeout / 1000,
            options.grpc_keepalive_permit_without_calls,
            options.grpc_http2_max_pings_without_data,
            options.grpc_http2_min_recv_ping_interval_without_data / 1000,
            options.grpc_http2_max_ping_strikes,
            options.grpc_max_connection_age / 1000,
            options.grpc_max_connection_age_grace / 1000,
        )


class Kept(Protocol):
    """The connection, as its keeper sees it."""

    num_written: int
    """HEADERS and DATA frames sent so far."""

    @property
    def has_calls(self) -> bool: ...
    def ping(self) -> None: ...
    def retire(self) -> None:
        """Takes no new calls; closes when those that are open have ended."""
        ...

    def abort(self) -> None: ...


class Keeper:
    """One connection's. `heard` is to be called for whatever comes, `may_ping` for every ping."""

    def __init__(self, connection: Kept, rules: KeepAlive, loop: asyncio.AbstractEventLoop) -> None:
        self._connection = connection
        self._rules = rules
        self._loop = loop
        self.last_heard_s = loop.time()
        self._num_written_at_ping = 0
        self._num_pings_sent = 0
        self._last_ping_s: float | None = None
        self._num_written_at_strike = 0
        self._num_strikes = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}
        if rules.time_s > 0:
            self._timers["keep-alive"] = loop.call_later(rules.time_s, self._look)
        if rules.max_age_s > 0:
            age_s = rules.max_age_s * random.uniform(1 - _AGE_SPREAD, 1 + _AGE_SPREAD)
            self._timers["age"] = loop.call_later(age_s, self._retire)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def may_ping(self) -> bool:
        """Whether the client's ping comes late enough after its last one; counts those that don't."""
        rules, now_s, before_s = self._rules, self._loop.time(), self._last_ping_s
        self._last_ping_s = now_s
        if self._connection.num_written != self._num_written_at_strike:
            self._num_written_at_strike = self._connection.num_written
            self._num_strikes = 0
            return True
        is_idle = not (self._connection.has_calls or rules.without_calls)
        interval_s = _IDLE_PING_INTERVAL_S if is_idle else rules.min_ping_interval_s
        if before_s is None or now_s >= before_s + interval_s:
            return True
        self._num_strikes += 1
        return not rules.max_strikes or self._num_strikes <= rules.max_strikes

    def _look(self) -> None:
        """Pings if the client has been silent for so long, and gives it `timeout_s` to say anything."""
        rules, now_s = self._rules, self._loop.time()
        silent_s = now_s - self.last_heard_s
        if silent_s < rules.time_s:
            self._timers["keep-alive"] = self._loop.call_later(rules.time_s - silent_s, self._look)
            return
        if not self._may_send_ping():
            self._timers["keep-alive"] = self._loop.call_later(rules.time_s, self._look)
            return
        self._connection.ping()
        self._timers["keep-alive"] = self._loop.call_later(rules.timeout_s, self._judge, now_s)

    def _may_send_ping(self) -> bool:
        rules, connection = self._rules, self._connection
        if not (connection.has_calls or rules.without_calls):
            return False
        if connection.num_written != self._num_written_at_ping:
            self._num_written_at_ping = connection.num_written
            self._num_pings_sent = 0
        if rules.max_pings_without_data and self._num_pings_sent >= rules.max_pings_without_data:
            return False
        self._num_pings_sent += 1
        return True

    def _judge(self, pinged_s: float) -> None:
        if self.last_heard_s <= pinged_s:
            self._connection.abort()
        else:
            self._look()

    def _retire(self) -> None:
        self._connection.retire()
        if self._rules.max_age_grace_s > 0:
            self._timers["age"] = self._loop.call_later(self._rules.max_age_grace_s, self._connection.abort)
