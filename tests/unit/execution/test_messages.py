"""Messages survive the wire however the stream is cut; nonsense is refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginehouse.errors import FailureReason, Internal, NotFound
from enginehouse.execution import messages as m
from enginehouse.types import ChatPrompt, FinishReason, GenerateRequest, TokenEvent, TokenLogprob

EXECUTE = m.Execute(
    7, 2, 640, 64, [], ["OUT"],
    [m.RequestRef("id", [m.TensorRef("X", 11, (1, -1), 0, 64)], [], {"a": 1, "b": "x", "c": True}, "corr", 3)], [9],
)  # fmt: skip
OTHERS = (m.Freed([1, 2, 3]), m.Cancel(1, 0), m.Segment(True, 1 << 20), m.Answer(4, {"x": [1, None]}))


@given(st.lists(st.sampled_from([EXECUTE, *OTHERS]), max_size=6), st.integers(1, 50))
def test_any_cut_of_the_stream_gives_the_same_messages(sent: list[msgspec.Struct], chunk: int) -> None:
    stream = b"".join(m.encode(message) for message in sent)
    reader = m.FrameReader(m.ToWorker)
    received = [message for at in range(0, len(stream), chunk) for message in reader.feed(stream[at : at + chunk])]
    assert received == sent


def test_errors_keep_code_text_and_reason() -> None:
    there = m.ErrorRef.of(NotFound("gone", reason=FailureReason.BACKEND))
    back = msgspec.convert(msgspec.to_builtins(there), m.ErrorRef).error()
    assert (type(back), str(back), back.reason) == (NotFound, "gone", FailureReason.BACKEND)


def test_generation_crosses_whole() -> None:
    request = GenerateRequest("llm", "r1", ChatPrompt([{"role": "user", "content": "hi"}]))
    [back] = m.FrameReader(m.ToWorker).feed(m.encode(m.Generate(1, request)))
    assert back.request.prompt.messages == [{"role": "user", "content": "hi"}]
    event = TokenEvent("r1", "x", [5], [[TokenLogprob(5, "x", -0.5)]], FinishReason.STOP, error=Internal("broke"))
    [events] = m.FrameReader(m.ToServer).feed(m.encode(m.Events(1, [event])))
    assert (events.events[0].logprobs[0][0].token_id, str(events.events[0].error)) == (5, "broke")


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", m.LENGTH.pack(3) + b"abc", m.LENGTH.pack(1) + b"\x01"])
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises((ValueError, msgspec.MsgspecError)):
        m.FrameReader(m.ToServer).feed(garbage)
