"""Who gets which events of an engine's message."""

from __future__ import annotations

from enginehouse.errors import Internal
from enginehouse.execution.generations import Generations
from enginehouse.types import FinishReason, TokenEvent


def test_a_receiver_that_fails_takes_nothing_from_the_others() -> None:
    generations, received = Generations(), list[str]()

    def fail(event: TokenEvent) -> None:
        raise RuntimeError("the connection is closed")

    generations.open("gone", fail)
    generations.open("there", lambda event: received.append(event.text))
    generations.on_events([TokenEvent("gone", "a"), TokenEvent("there", "b")])
    generations.on_events([TokenEvent("gone", "c"), TokenEvent("there", "d", finish_reason=FinishReason.STOP)])
    assert received == ["b", "d"]
    assert "gone" not in generations
    assert "there" not in generations


def test_a_receiver_that_fails_with_an_event_is_told_so() -> None:
    generations, received = Generations(), list[TokenEvent]()

    def take(event: TokenEvent) -> None:
        if event.error is None:
            raise IndexError("of what the event says")
        assert "picky" in generations, "it can still be cancelled"
        received.append(event)

    generations.open("picky", take)
    generations.on_events([TokenEvent("picky", "a"), TokenEvent("picky", "b")])
    assert [type(event.error) for event in received] == [Internal]
    assert "picky" not in generations
