"""Token events as server-sent events, pushed to the connection from the engine's callback.

A chunk of a plain token is three pieces of bytes joined: what can be made once is made once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson

from enginehouse.core import Core
from enginehouse.errors import EnginehouseError, ResourceExhausted
from enginehouse.frontends.http_message import EVENTS, Channel, HttpPush
from enginehouse.frontends.openai.answers import Answer, finish_text, usage
from enginehouse.frontends.openai.errors import error_document
from enginehouse.frontends.openai.generation import Generation
from enginehouse.types import GenerateRequest, TokenEvent

DONE = b"data: [DONE]\n\n"
MAX_WAITING_BYTES = 16 * 1024 * 1024
"""A client that lets more than that pile up loses its answer; the engine never waits."""


class ChunkWriter:
    """Makes the chunks of one answer."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._plain = answer.num_top_logprobs is None and not answer.continuous_usage
        self._seen: set[int] = set()
        self._offsets: dict[int, int] = {}
        self._last: dict[int, TokenEvent] = {}
        self._before = b"data: " + orjson.dumps(answer.head(streamed=True))[:-1] + b',"choices":[{"index":'
        self._text = b',"delta":{"content":' if answer.is_chat else b',"text":'
        self._after = b"}" if answer.is_chat else b""
        self._after += b',"logprobs":null,"finish_reason":null'
        self._end = b'}],"usage":null}\n\n' if answer.include_usage else b"}]}\n\n"

    def chunks(self, index: int, event: TokenEvent) -> bytes:
        """What a client gets for the event."""
        first = index not in self._seen
        if first:
            self._seen.add(index)
        elif self._plain and event.finish_reason is None:
            return self._plain_chunk(index, event)
        self._last[index] = event
        return self._full_chunks(index, event, first)

    def end(self) -> bytes:
        """After the last event of the last choice."""
        if not self._answer.include_usage:
            return DONE
        document = self._answer.head(streamed=True)
        document |= {"choices": [], "usage": usage(self._answer, self._last)}
        return _event(document) + DONE

    def _plain_chunk(self, index: int, event: TokenEvent) -> bytes:
        tokens = b',"token_ids":' + orjson.dumps(list(event.token_ids)) if self._answer.return_token_ids else b""
        return b"%b%d%b%b%b%b%b" % (
            self._before, index, self._text, orjson.dumps(event.text), self._after, tokens, self._end,
        )  # fmt: skip

    def _full_chunks(self, index: int, event: TokenEvent, first: bool) -> bytes:
        answer = self._answer
        offset = self._offsets.get(index, 0)
        text = event.text
        if first and answer.echo:
            text = (event.prompt_text or "") + ("" if answer.echo_only else text)
            offset = len(event.prompt_text or "")
        self._offsets[index] = offset + len(event.text)
        choice: dict[str, Any] = {"index": index}
        parts = b""
        if answer.is_chat:
            if first:
                parts = self._role_chunk(index, event)
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice["logprobs"] = answer.logprobs(event, offset)
        choice["finish_reason"] = finish_text(event.finish_reason)
        if event.finish_reason is not None:
            choice["stop_reason"] = event.stop_reason
        if answer.return_token_ids:
            choice["token_ids"] = list(event.token_ids)
            if first and not answer.is_chat:
                choice["prompt_token_ids"] = list(event.prompt_token_ids or ())
        return parts + _event(self._document([choice]))

    def _role_chunk(self, index: int, event: TokenEvent) -> bytes:
        """Who speaks, before what is said."""
        choice = {
            "index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None,
        }  # fmt: skip
        document = self._document([choice])
        if self._answer.return_token_ids:
            document["prompt_token_ids"] = list(event.prompt_token_ids or ())
        return _event(document)

    def _document(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        document = self._answer.head(streamed=True)
        document["choices"] = choices
        if self._answer.continuous_usage:
            document["usage"] = usage(self._answer, self._last)
        elif self._answer.include_usage:
            document["usage"] = None
        return document


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


class TokenStream:
    """One streamed answer, from the first event to the last."""

    def __init__(self, core: Core, answer: Answer, requests: Sequence[GenerateRequest]) -> None:
        self._writer = ChunkWriter(answer)
        self._generation = Generation(core, requests, self._on_event)
        self._early: list[tuple[int, TokenEvent]] = []
        self._num_unfinished = len(requests)
        """Sequences whose end is not sent; 0 once nothing more may be."""
        self._channel: Channel | None = None
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def reply(self) -> HttpPush:
        """Once the first event is there. Raises what the engine refuses the request with."""
        self._generation.start()
        try:
            await self._started
        except asyncio.CancelledError:
            self._generation.cancel()
            raise
        error = self._early[0][1].error
        if error is not None:
            self._generation.cancel()
            raise error
        return HttpPush(200, EVENTS, self._begin, self._generation.cancel, (("Cache-Control", "no-cache"),))

    def _begin(self, channel: Channel) -> None:
        self._channel = channel
        for index, event in self._early:
            self._send(channel, index, event)
        self._early.clear()

    def _on_event(self, index: int, event: TokenEvent) -> None:
        if self._channel is not None:
            self._send(self._channel, index, event)
            return
        self._early.append((index, event))
        if not self._started.done():
            self._started.set_result(None)

    def _send(self, channel: Channel, index: int, event: TokenEvent) -> None:
        if not self._num_unfinished:
            return
        if event.error is not None:
            self._fail(channel, event.error)
            return
        channel.send(self._writer.chunks(index, event))
        if event.finish_reason is not None:
            self._num_unfinished -= 1
            if not self._num_unfinished:
                channel.send(self._writer.end())
                channel.close()
        elif channel.num_waiting_bytes > MAX_WAITING_BYTES:
            self._fail(channel, ResourceExhausted("the client reads too slowly: its answer was given up"))

    def _fail(self, channel: Channel, error: EnginehouseError) -> None:
        self._generation.cancel()
        self._num_unfinished = 0
        channel.send(_event(error_document(error)) + DONE)
        channel.close()
