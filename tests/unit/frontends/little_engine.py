"""An engine of letters, for tests of the OpenAI front end: token ids are code points, answers go up the alphabet.

Real in what front ends rely on: stop strings, limits, log probabilities, errors late and early, cancellation.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from enginehouse.config.schema import ModelConfig
from enginehouse.core import Core
from enginehouse.errors import InvalidArgument
from enginehouse.frontends.http_routes import Router
from enginehouse.frontends.openai.front_end import OpenAIFrontEnd
from enginehouse.frontends.restricted_apis import RestrictedApis
from enginehouse.observe.logs import LogSettings
from enginehouse.options import ServerOptions
from enginehouse.repository.registry import Registry, ServedVersion, VersionState
from enginehouse.types import (
    ChatPrompt,
    FinishReason,
    GenerateRequest,
    GenerateTask,
    MetricFamily,
    TokenEvent,
    TokenLogprob,
)

Emit = Callable[[TokenEvent], None]
CONTEXT = 100


def text_of(prompt: str | Sequence[int] | ChatPrompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, ChatPrompt):
        lines = [f"{message['role']}:{message['content']}" for message in prompt.messages]
        return "|".join(lines) + ("|assistant:" if prompt.add_generation_prompt else "")
    return "".join(map(chr, prompt))


def alternatives(letter: str, number: int) -> list[TokenLogprob]:
    """The letter with probability a half, those after it with ever less."""
    return [
        TokenLogprob(ord(letter) + rank, chr(ord(letter) + rank), -math.log(2.0) * (rank + 1), rank + 1)
        for rank in range(max(number, 1))
    ]


@dataclass
class LetterEngine:
    """`gate` holds every sequence back until it is set."""

    gate: asyncio.Event | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def submit(self, request: GenerateRequest, emit: Emit) -> None:
        if request.sampling.bad_words:
            raise InvalidArgument("refused at once")
        self.requests.append(request)
        self.tasks[request.id] = asyncio.get_running_loop().create_task(self._run(request, emit))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.tasks[request_id].cancel()

    async def metrics(self) -> Sequence[MetricFamily]:
        return ()

    async def _run(self, request: GenerateRequest, emit: Emit) -> None:
        prompt = text_of(request.prompt)
        if request.task is not GenerateTask.GENERATE:
            emit(
                TokenEvent(
                    request.id,
                    text=prompt,
                    finish_reason=FinishReason.STOP,
                    num_prompt_tokens=len(prompt),
                    prompt_token_ids=list(map(ord, prompt)),
                    prompt_text=prompt,
                )
            )
            return
        if len(prompt) > CONTEXT:
            emit(TokenEvent(request.id, error=InvalidArgument(f"prompt of {len(prompt)} tokens is too long")))
            return
        if self.gate is not None:
            await self.gate.wait()
        events = self._events(request, prompt)
        for event in events if request.stream else [_merged(events)]:
            emit(event)
            await asyncio.sleep(0)

    def _events(self, request: GenerateRequest, prompt: str) -> list[TokenEvent]:
        sampling = request.sampling
        limit = sampling.max_tokens or CONTEXT - len(prompt)
        letters = [chr(ord("a") + ((sampling.seed or 0) + index) % 26) for index in range(limit)]
        events = []
        for count, letter in enumerate(letters, 1):
            stopped = letter in sampling.stop
            finish = FinishReason.STOP if stopped else FinishReason.LENGTH if count == limit else None
            known = sampling.logprobs
            events.append(
                TokenEvent(
                    request.id,
                    "" if stopped else letter,
                    [ord(letter)],
                    () if known is None else [alternatives(letter, known)],
                    finish,
                    letter if stopped else None,
                    None,
                    len(prompt),
                    2,
                    count,
                )
            )
            if stopped:
                break
        if request.return_prompt:
            events[0].prompt_token_ids, events[0].prompt_text = list(map(ord, prompt)), prompt
        if sampling.prompt_logprobs is not None:
            events[0].prompt_logprobs = [
                None,
                *(alternatives(letter, sampling.prompt_logprobs) for letter in prompt[1:]),
            ]
        return events


def _merged(events: Sequence[TokenEvent]) -> TokenEvent:
    first, last = events[0], events[-1]
    last.text = "".join(event.text for event in events)
    last.token_ids = [token for event in events for token in event.token_ids]
    last.logprobs = [tokens for event in events for tokens in event.logprobs]
    last.prompt_token_ids, last.prompt_text = first.prompt_token_ids, first.prompt_text
    last.prompt_logprobs = first.prompt_logprobs
    return last


@dataclass
class Hosted:
    generative: LetterEngine


def letter_server(
    engine: LetterEngine,
    names: Sequence[str] = ("letters",),
    failed: Mapping[str, str] | None = None,
    **options: object,
) -> Router:
    """`failed`: models that could not be loaded, and why."""
    chosen = ServerOptions(**options)  # type: ignore[arg-type]  # the tests' own names
    registry = Registry()
    core = Core(registry, options=chosen, tracing=None, logs=LogSettings(), metrics=None)
    core.started = True
    for name in names:
        served = ServedVersion(name, 1, ModelConfig(name=name), {}, {}, generative=True)
        served.hosted = Hosted(engine)
        registry.set_state(name, 1, VersionState.READY, served=served)
    for name, reason in (failed or {}).items():
        registry.set_state(name, 1, VersionState.UNAVAILABLE, reason)
    return Router(OpenAIFrontEnd(core, chosen).routes(), RestrictedApis(()))
