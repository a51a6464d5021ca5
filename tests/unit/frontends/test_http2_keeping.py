"""Keep-alive on a loop whose time is told: who is pinged, who is closed, who pings too often."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count
from typing import Any, cast

from enginehouse.frontends.http2_keeping import KeepAlive, Keeper
from enginehouse.options import ServerOptions


class Loop:
    """Time and timers, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = count()

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Callable[..., None], *arguments: Any) -> Timer:
        timer = Timer(callback, arguments)
        heapq.heappush(self._timers, (self.now_s + delay_s, next(self._numbers), timer))
        return timer

    def pass_s(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self._timers and self._timers[0][0] <= end_s:
            self.now_s, _, timer = heapq.heappop(self._timers)
            if not timer.is_cancelled:
                timer.callback(*timer.arguments)
        self.now_s = end_s


class Timer:
    def __init__(self, callback: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.callback, self.arguments = callback, arguments
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Connection:
    """Notes what it is told to do."""

    def __init__(self, options: ServerOptions) -> None:
        self.loop = Loop()
        self.has_calls = True
        self.num_written = 0
        self.done: list[str] = []
        self.acknowledges = False
        self.keeper = Keeper(self, KeepAlive.of(options), cast(asyncio.AbstractEventLoop, self.loop))

    def ping(self) -> None:
        self.done.append("ping")
        if self.acknowledges:
            self.loop.call_later(0.1, self.hear)

    def retire(self) -> None:
        self.done.append("retire")

    def abort(self) -> None:
        self.done.append("abort")
        self.keeper.close()

    def hear(self) -> None:
        self.keeper.last_heard_s = self.loop.time()


def test_a_silent_client_is_pinged_and_closed_if_it_stays_silent() -> None:
    connection = Connection(ServerOptions(grpc_keepalive_time=10_000, grpc_keepalive_timeout=3_000))
    connection.loop.pass_s(6)
    connection.hear()
    connection.loop.pass_s(9)
    assert connection.done == []
    connection.loop.pass_s(2)
    assert connection.done == ["ping"]
    connection.loop.pass_s(1)
    connection.hear()
    connection.loop.pass_s(9)
    assert connection.done == ["ping"]
    connection.loop.pass_s(1)
    assert connection.done == ["ping", "ping"]
    connection.loop.pass_s(60)
    assert connection.done == ["ping", "ping", "abort"]


def test_without_calls_nobody_is_pinged_unless_that_is_permitted() -> None:
    for permitted, expected in ((False, []), (True, ["ping"])):
        connection = Connection(
            ServerOptions(grpc_keepalive_time=10_000, grpc_keepalive_permit_without_calls=permitted)
        )
        connection.has_calls = False
        connection.loop.pass_s(15)
        assert connection.done == expected


def test_so_many_pings_go_out_between_two_answers() -> None:
    connection = Connection(ServerOptions(grpc_keepalive_time=10_000))
    connection.acknowledges = True
    connection.loop.pass_s(100)
    assert connection.done == ["ping", "ping"]
    connection.num_written += 1
    connection.loop.pass_s(100)
    assert connection.done == ["ping"] * 4


def test_pings_that_come_too_early_are_strikes_until_something_is_sent() -> None:
    options = ServerOptions(grpc_http2_min_recv_ping_interval_without_data=5_000, grpc_http2_max_ping_strikes=1)
    connection = Connection(options)
    keeper = connection.keeper
    assert keeper.may_ping()
    connection.loop.pass_s(5)
    assert keeper.may_ping()  # late enough
    assert keeper.may_ping()  # the strike that is let pass
    connection.num_written += 1
    assert keeper.may_ping()
    assert keeper.may_ping()
    assert not keeper.may_ping()
    unlimited = Connection(ServerOptions(grpc_http2_max_ping_strikes=0))
    assert all(unlimited.keeper.may_ping() for _ in range(100))


def test_a_connection_without_calls_may_ping_every_two_hours() -> None:
    options = ServerOptions(grpc_http2_min_recv_ping_interval_without_data=5_000, grpc_http2_max_ping_strikes=1)
    connection = Connection(options)
    connection.has_calls = False
    for _ in range(2):
        assert connection.keeper.may_ping()
        connection.loop.pass_s(10)
    assert not connection.keeper.may_ping()
    connection.loop.pass_s(7200)
    assert connection.keeper.may_ping()


def test_an_old_connection_takes_no_new_calls_and_then_ends() -> None:
    connection = Connection(ServerOptions(grpc_max_connection_age=60_000, grpc_max_connection_age_grace=5_000))
    connection.loop.pass_s(53)
    assert connection.done == []
    connection.loop.pass_s(14)
    assert connection.done[0] == "retire"
    connection.loop.pass_s(5)
    assert connection.done == ["retire", "abort"]


def test_nothing_is_left_of_a_connection_that_has_closed() -> None:
    connection = Connection(ServerOptions(grpc_keepalive_time=1_000, grpc_max_connection_age=1_000))
    connection.keeper.close()
    connection.loop.pass_s(60)
    assert connection.done == []
