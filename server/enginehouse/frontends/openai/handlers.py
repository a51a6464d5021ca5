"""The endpoints: from a body to generate requests, from events to an answer."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from enginehouse.core import Core, ServedVersion
from enginehouse.errors import InvalidArgument, NotFound
from enginehouse.frontends.http_message import HttpRequest, HttpResponse, Reply
from enginehouse.frontends.openai.answers import Answer, whole_answer
from enginehouse.frontends.openai.errors import BadField
from enginehouse.frontends.openai.generation import run
from enginehouse.frontends.openai.requests import ChatRequest, Common, CompletionRequest, decode
from enginehouse.frontends.openai.sampling import chat_sampling, completion_sampling, num_choices
from enginehouse.frontends.openai.streams import TokenStream
from enginehouse.frontends.tenants import TenantHeader
from enginehouse.options import ServerOptions
from enginehouse.types import ChatPrompt, GenerateRequest, SamplingParameters

MAX_SEQUENCES = 1024
"""Prompts times choices of one request."""
_numbers = itertools.count()
_run_id = secrets.token_hex(6)


class GenerationHandlers:
    def __init__(self, core: Core, options: ServerOptions) -> None:
        self._core = core
        self._tenants = TenantHeader.of(options.tenant_header)
        self._default_max_tokens = options.default_max_tokens
        self._chat_template = _read_template(options.chat_template)
        self._trusts_templates = options.trust_request_chat_template

    async def completions(self, http: HttpRequest) -> Reply:
        body = decode(http.body, CompletionRequest)
        served = await model_of(self._core, body.model)
        prompts = prompts_of(body.prompt)
        sampling = completion_sampling(body, self._default_max_tokens)
        answer = _answer(body, http, served, "cmpl-", len(prompts), sampling.logprobs)
        answer.echo = bool(body.echo)
        answer.echo_only = answer.echo and body.max_tokens == 0
        return await self._generate(body, http, answer, prompts, sampling)

    async def chat(self, http: HttpRequest) -> Reply:
        body = decode(http.body, ChatRequest)
        served = await model_of(self._core, body.model)
        sampling = chat_sampling(body)
        answer = _answer(body, http, served, "chatcmpl-", 1, sampling.logprobs)
        if body.chat_template and not self._trusts_templates:
            raise BadField("chat_template", "a request may bring one only with --trust-request-chat-template")
        prompt = chat_prompt(body, self._chat_template)
        return await self._generate(body, http, answer, [prompt], sampling)

    async def _generate(
        self,
        body: Common,
        http: HttpRequest,
        answer: Answer,
        prompts: Sequence[str | Sequence[int] | ChatPrompt],
        sampling: SamplingParameters,
    ) -> Reply:
        tenant = self._tenants.tenant(http.headers.get) or body.user or ""
        requests = _requests(body, tenant, answer, prompts, sampling)
        if body.stream:
            return await TokenStream(self._core, answer, requests).reply()
        events = await run(self._core, requests)
        return HttpResponse(200, body=(orjson.dumps(whole_answer(answer, events)),))


async def model_of(core: Core, name: str) -> ServedVersion:
    """The language model of that name; of none, the only one. Raises NotFound."""
    if not name:
        names = [served.name for served in core.registry.all_ready() if served.generative]
        if len(set(names)) != 1:
            raise BadField("model", f"is missing; there are: {', '.join(sorted(set(names))) or 'none'}")
        name = names[0]
    try:
        served = await core.loaded_model(name)
    except (NotFound, InvalidArgument):
        raise not_served(core, name) from None
    if not served.generative:
        raise NotFound(f"The model '{name}' is no language model.")
    return served


def not_served(core: Core, name: str) -> NotFound:
    """Says why, where there is such a model and it could not be loaded."""
    reason = core.why_unready(name)
    if reason:
        return NotFound(f"The model '{name}' is not available: {reason}")
    return NotFound(f"The model '{name}' does not exist.")


def prompts_of(given: str | list[Any] | None, field: str = "prompt") -> list[str | list[int]]:
    """One for each text or list of token ids. `field` is what errors call it."""
    if given is None:
        raise BadField(field, "is missing")
    if isinstance(given, str):
        return [given]
    if not given:
        raise BadField(field, "is empty")
    if isinstance(given[0], int):
        return [_token_ids(given, field)]
    if len(given) > MAX_SEQUENCES:
        raise BadField(field, f"{len(given)} prompts are more than {MAX_SEQUENCES}")
    return [each if isinstance(each, str) else _token_ids(each, field) for each in given]


def _token_ids(given: Any, field: str) -> list[int]:
    if not isinstance(given, list) or set(map(type, given)) != {int}:
        raise BadField(field, "is neither a text nor a list of token ids, nor a list of them")
    if min(given) < 0:
        raise BadField(field, f"{min(given)} is no token id")
    return given


def chat_prompt(body: ChatRequest, chat_template: str) -> ChatPrompt:
    if not body.messages:
        raise BadField("messages", "is empty")
    for index, message in enumerate(body.messages):
        if not isinstance(message.get("role"), str):
            raise BadField("messages", f"message {index} has no role")
    continues = bool(body.continue_final_message)
    generates = body.add_generation_prompt if body.add_generation_prompt is not None else not continues
    if continues and generates:
        raise BadField("continue_final_message", "contradicts add_generation_prompt")
    return ChatPrompt(
        messages=body.messages,
        tools=None if body.tool_choice == "none" else body.tools,
        documents=body.documents,
        add_generation_prompt=generates,
        continue_final_message=continues,
        chat_template=body.chat_template or chat_template,
        template_arguments=body.chat_template_kwargs or {},
    )


def _answer(
    body: Common, http: HttpRequest, served: ServedVersion, prefix: str, num_prompts: int, logprobs: int | None
) -> Answer:
    if body.stream_options is not None and not body.stream:
        raise BadField("stream_options", "needs stream: true")
    options = body.stream_options
    n = num_choices(body)
    if num_prompts * n > MAX_SEQUENCES:
        raise BadField("n", f"{n} choices for each of {num_prompts} prompts are more than {MAX_SEQUENCES}")
    given = body.request_id or http.headers.get("x-request-id")
    return Answer(
        id=prefix + (given or f"{_run_id}{next(_numbers):08x}"),
        model=served.name,
        is_chat=isinstance(body, ChatRequest),
        prompts=[prompt for prompt in range(num_prompts) for _ in range(n)],
        num_top_logprobs=logprobs,
        return_token_ids=bool(body.return_token_ids),
        return_prompt_text=bool(body.return_prompt_text),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )


def _requests(
    body: Common,
    tenant: str,
    answer: Answer,
    prompts: Sequence[str | Sequence[int] | ChatPrompt],
    sampling: SamplingParameters,
) -> list[GenerateRequest]:
    # Clients may repeat their ids; the engine's must be unique.
    engine_id = f"{answer.id}-{next(_numbers):x}"
    num_choices_each = len(answer.prompts) // len(prompts)
    return [
        GenerateRequest(
            model_name=answer.model,
            id=f"{engine_id}-{index}",
            prompt=prompts[prompt],
            sampling=_seeded(sampling, index % num_choices_each),
            stream=bool(body.stream),
            return_prompt=answer.echo or answer.return_token_ids or answer.return_prompt_text,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            add_special_tokens=body.add_special_tokens is not False and not answer.is_chat,
            priority=body.priority or 0,
            tenant=tenant,
            cache_salt=body.cache_salt or "",
        )
        for index, prompt in enumerate(answer.prompts)
    ]


def _seeded(sampling: SamplingParameters, choice: int) -> SamplingParameters:
    """Choices of one prompt differ, and the same seed gives the same set of them."""
    if sampling.seed is None or choice == 0:
        return sampling
    fields: dict[str, Any] = {name: getattr(sampling, name) for name in SamplingParameters.__slots__}
    return SamplingParameters(**fields | {"seed": sampling.seed + choice})


def _read_template(path: str) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"--chat-template: can't read '{path}': {error.strerror}") from None
