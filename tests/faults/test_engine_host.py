"""An engine in a process: events stream out of it, and its end is an event of every sequence in it."""

from __future__ import annotations

import asyncio

import pytest

from enginehouse.errors import InvalidArgument, Unavailable
from enginehouse.execution.contract import HostState
from enginehouse.types import FinishReason, GenerateRequest, SamplingParameters, TokenEvent
from tests.faults.hosting import Hosted, hosted

pytestmark = pytest.mark.asyncio

ENGINE = 'backend: "generative" serving { host: HOST_AUTO }'


class Sequence:
    """One sequence and what it has given so far."""

    def __init__(self, host: Hosted, request_id: str, prompt: str = "", num_tokens: int = 3) -> None:
        self.events: list[TokenEvent] = []
        self.finished = asyncio.Event()
        self.started = asyncio.Event()
        request = GenerateRequest("m", request_id, prompt, SamplingParameters(max_tokens=num_tokens))
        assert host.model.generative is not None
        host.model.generative.submit(request, self._on_event)

    def _on_event(self, event: TokenEvent) -> None:
        self.events.append(event)
        self.started.set()
        if event.finish_reason is not None or event.error is not None:
            self.finished.set()

    async def end(self) -> TokenEvent:
        await asyncio.wait_for(self.finished.wait(), 10)
        return self.events[-1]


async def test_every_sequence_gets_its_own_events_in_order() -> None:
    async with hosted(ENGINE) as host:
        sequences = [Sequence(host, f"s{number}", num_tokens=number) for number in range(1, 9)]
        for number, sequence in enumerate(sequences, 1):
            assert (await sequence.end()).finish_reason is FinishReason.LENGTH
            assert [event.token_ids for event in sequence.events] == [[left] for left in range(number, 0, -1)]


async def test_cancelling_ends_a_sequence_early() -> None:
    async with hosted(ENGINE) as host:
        endless = Sequence(host, "s", num_tokens=1_000_000)
        await asyncio.wait_for(endless.started.wait(), 10)
        assert host.model.generative is not None
        host.model.generative.cancel("s")
        assert (await endless.end()).finish_reason is FinishReason.ABORT


async def test_a_refusal_is_the_sequences_only_event() -> None:
    async with hosted(ENGINE) as host:
        refused = Sequence(host, "s", "refuse")
        assert isinstance((await refused.end()).error, InvalidArgument)
        assert str(refused.events[0].error) == "won't do"


async def test_a_crash_ends_every_sequence_at_once_and_the_engine_comes_back() -> None:
    async with hosted(ENGINE) as host:
        others = [Sequence(host, f"s{number}", num_tokens=1_000_000) for number in range(3)]
        crashing = Sequence(host, "crash", "crash")
        for sequence in (*others, crashing):
            error = (await sequence.end()).error
            assert isinstance(error, Unavailable)
            assert "was killed by signal 11 (SIGSEGV)" in str(error)
        assert host.state is HostState.RESTARTING
        with pytest.raises(Unavailable, match="is not running"):
            Sequence(host, "too soon")
        await host.until_ready()
        assert (await Sequence(host, "s0").end()).finish_reason is FinishReason.LENGTH


async def test_the_engines_metrics_are_read_from_its_process() -> None:
    async with hosted(ENGINE) as host:
        assert host.model.generative is not None
        [family] = await host.model.generative.metrics()
        assert (family.name, family.samples) == ("steps", [("", {"a": "b"}, 5.0)])
