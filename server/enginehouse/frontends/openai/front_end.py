"""The table of routes of the OpenAI API, and what surrounds the two that generate."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from enginehouse.core import Core, ServedVersion
from enginehouse.errors import EnginehouseError, InvalidArgument
from enginehouse.frontends.compression import too_large
from enginehouse.frontends.http1 import Request
from enginehouse.frontends.http_message import NOT_FOUND, HttpRequest, HttpResponse, Reply, error_response
from enginehouse.frontends.http_routes import PathParts, Route, RouteHandler
from enginehouse.frontends.openai.embeddings import EmbeddingHandler
from enginehouse.frontends.openai.errors import BadField, error_reply, named_error
from enginehouse.frontends.openai.generation import run
from enginehouse.frontends.openai.handlers import GenerationHandlers, chat_prompt, model_of, not_served
from enginehouse.frontends.openai.model_management import ModelManagement, detail
from enginehouse.frontends.openai.requests import ChatRequest, DetokenizeRequest, TokenizeRequest, decode
from enginehouse.frontends.openai.restricted import RestrictedOpenAIApis
from enginehouse.frontends.wire_errors import as_wire_error
from enginehouse.options import ModelControlMode, ServerOptions
from enginehouse.types import ChatPrompt, GenerateRequest, GenerateTask

GET, POST = ("GET",), ("POST",)
OWNER = "Triton Inference Server"
"""What clients of Triton's OpenAI front end find in a model's `owned_by`."""


class OpenAIFrontEnd:
    def __init__(self, core: Core, options: ServerOptions) -> None:
        self._core = core
        self._created = int(time.time())
        self._generation = GenerationHandlers(core, options)
        self._embedding = EmbeddingHandler(core, options)
        self._management = ModelManagement(core, self._describe)
        self._restricted = RestrictedOpenAIApis(options.openai_restricted_api)
        self._max_body_bytes = options.http_max_input_size
        self._num_asked = 0

    def routes(self) -> list[Route]:
        generation = self._generation
        return [
            Route("/v1/completions", POST, None, self._guarded(generation.completions)),
            Route("/v1/chat/completions", POST, None, self._guarded(generation.chat)),
            Route("/v1/embeddings", POST, None, self._guarded(self._embedding.embeddings, "embedding")),
            Route("/v1/models", GET, None, self._keyed(self._list_models)),
            Route("/v1/models/(?P<model>.*)/load", POST, None, self._keyed(self._management.load())),
            Route("/v1/models/(?P<model>.*)/unload", POST, None, self._keyed(self._management.unload())),
            Route("/v1/models/(?P<model>.+)", GET, None, self._keyed(self._show_model)),
            Route("/tokenize", POST, None, self._guarded(self._tokenize)),
            Route("/detokenize", POST, None, self._guarded(self._detokenize)),
            Route("/health(?:/ready)?", GET, None, self._health),
            Route("/ping", GET + POST, None, self._health),
            Route("/version", GET, None, self._version),
        ]

    def _guarded(self, handler: Callable[[HttpRequest], Awaitable[Reply]], group: str = "inference") -> RouteHandler:
        """Errors in this API's shape; and no route at all to what only language models do where there is none."""

        async def handle(http: HttpRequest, parts: PathParts) -> Reply:
            if group == "inference" and not self._may_have_models():
                return NOT_FOUND
            if (refused := self._refused(group, http)) is not None:
                return refused
            if len(http.body) > self._max_body_bytes:
                return self._too_large()
            try:
                return await handler(http)
            except EnginehouseError as error:
                return error_reply(error)
            except OverflowError as error:  # of an integer somewhere in a message or a template's arguments
                return error_reply(InvalidArgument(f"request body: {error}"))
            except Exception as error:
                return error_reply(as_wire_error(error))

        return handle

    def _refused(self, group: str, http: HttpRequest) -> Reply | None:
        header = self._restricted.missing_header(group, http.headers.get)
        return None if header is None else detail(401, f"This API is restricted, expecting header '{header}'")

    def _keyed(self, handler: RouteHandler) -> RouteHandler:
        """Only for who has the header of the group `model-repository`, if it has one."""

        async def handle(http: HttpRequest, parts: PathParts) -> Reply:
            return self._refused("model-repository", http) or await handler(http, parts)

        return handle

    def _models(self) -> dict[str, ServedVersion]:
        return {served.name: served for served in self._core.registry.all_ready() if served.generative}

    def _may_have_models(self) -> bool:
        """What isn't ready may be a language model: to be loaded by request or on demand, or one whose load failed."""
        records = self._core.registry.models.values()
        if not records and self._core.options.model_control_mode is ModelControlMode.EXPLICIT:
            return True
        return any(record.default is None or record.default.generative for record in records)

    def refuse_large(self, request: Request, max_body_bytes: int) -> HttpResponse:
        """As this API's clients expect it, on its own paths; else as on all others."""
        if request.path.startswith("/v1/"):
            return self._too_large()
        return error_response(too_large(request.body_bytes, max_body_bytes, "request JSON size of"))

    def _too_large(self) -> HttpResponse:
        limit = f"exceeds the maximum allowed input size of {self._max_body_bytes} bytes"
        text = f"Request content size {limit}. Use --http-max-input-size to increase the limit."
        return named_error(413, "content_too_large", text)

    # --- models

    async def _list_models(self, http: HttpRequest, parts: PathParts) -> Reply:
        models = self._models()
        if not models and not self._may_have_models():
            return NOT_FOUND
        return _json({"object": "list", "data": [self._describe(name) for name in models]})

    async def _show_model(self, http: HttpRequest, parts: PathParts) -> Reply:
        if parts["model"] in self._models():
            return _json(self._describe(parts["model"]))
        return error_reply(not_served(self._core, parts["model"])) if self._may_have_models() else NOT_FOUND

    def _describe(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": OWNER}

    # --- text and tokens

    async def _tokenize(self, http: HttpRequest) -> Reply:
        body = decode(http.body, TokenizeRequest)
        served = await model_of(self._core, body.model)
        prompt: str | ChatPrompt
        if body.messages is not None:
            chat = ChatRequest(
                messages=body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
            )
            prompt = chat_prompt(chat, "")
        elif body.prompt is not None:
            prompt = body.prompt
        else:
            raise BadField("prompt", "is missing, and so is messages")
        add_special = body.add_special_tokens is not False and body.messages is None
        event = await self._ask(served, prompt, GenerateTask.TOKENIZE, add_special)
        tokens = list(event.prompt_token_ids or ())
        return _json({"count": len(tokens), "tokens": tokens, "prompt": event.prompt_text})

    async def _detokenize(self, http: HttpRequest) -> Reply:
        body = decode(http.body, DetokenizeRequest)
        served = await model_of(self._core, body.model)
        event = await self._ask(served, body.tokens, GenerateTask.DETOKENIZE, False)
        return _json({"prompt": event.text})

    async def _ask(
        self, served: ServedVersion, prompt: str | list[int] | ChatPrompt, task: GenerateTask, add_special: bool
    ) -> Any:
        self._num_asked += 1
        request = GenerateRequest(
            served.name,
            f"{task.value}-{self._num_asked}",
            prompt,
            task=task,
            return_prompt=True,
            add_special_tokens=add_special,
        )
        [event] = await run(self._core, [request])
        return event

    # --- the server

    async def _health(self, http: HttpRequest, parts: PathParts) -> Reply:
        return HttpResponse(200 if self._core.is_ready() else 503)

    async def _version(self, http: HttpRequest, parts: PathParts) -> Reply:
        return _json({"version": self._core.server_version})


def _json(document: Any) -> HttpResponse:
    return HttpResponse(200, body=(orjson.dumps(document),))
