"""SageMaker's routes: /ping, /invocations of one model, and /models of many that come and go.

Models of a multi-model endpoint come as a folder that holds one model, or an ensemble beside its members;
they are served under the name that SageMaker gives them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from enginehouse.config.json_form import to_wire
from enginehouse.config.reading import read_config
from enginehouse.core import Core
from enginehouse.errors import EnginehouseError, InvalidArgument
from enginehouse.frontends.cloud.binary_type import BinaryType
from enginehouse.frontends.http_message import JSON, TEXT, HttpRequest, HttpResponse, Reply, error_body
from enginehouse.frontends.http_routes import PathParts, Route, RouteHandler
from enginehouse.frontends.json_values import as_string, parse_json
from enginehouse.frontends.restricted_apis import Api
from enginehouse.repository.layout import Brought, Entry

_BINARY = BinaryType("sagemaker")
_OUT_OF_MEMORY = (
    "out of memory", "out_of_memory", "memoryerror", "outofmemory", "oom", "failed to allocate memory",
    "no space left on device", "alloc_failed",
)  # fmt: skip
_FORBIDDEN = ("/dev/", "/proc/", "/sys/")
INFERENCE_TYPES = ("infer", "generate", "generate_stream")
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TargetModel:
    """repository.storage.Root of what SageMaker put into one folder: the main model under another name."""

    url: str
    main: Path
    name: str
    members: Mapping[str, Path]
    watched_folder: Path | None = None

    def entries(self) -> list[Entry]:
        return [Entry(name, is_folder=True) for name in (self.name, *self.members)]

    def find(self, name: str) -> Entry | None:
        return Entry(name, is_folder=True) if name == self.name or name in self.members else None

    def bring(self, entry: Entry, name: str) -> Brought:
        return Brought(self.main if name == self.name else self.members[name])


def target_model(folder: Path, name: str) -> TargetModel:
    """Raises InvalidArgument for a folder that holds no model, or several and no ensemble."""
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    ensembles = [path for path in subfolders if _is_ensemble(path)]
    if len(subfolders) == 1:
        main = subfolders[0]
    elif len(ensembles) == 1:
        main = ensembles[0]
    else:
        raise InvalidArgument(
            f"{folder} must hold one model, or one ensemble beside its members; it holds "
            f"{len(subfolders)} folders and {len(ensembles)} ensembles"
        )
    members = {path.name: path for path in subfolders if path != main}
    return TargetModel(str(folder.parent), main, name, members)


def _is_ensemble(folder: Path) -> bool:
    config = folder / "config.pbtxt"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return "ensemble_scheduling" in text or 'platform: "ensemble"' in text


class SageMaker:
    """`infer` and `generate*` are the v2 handlers."""

    def __init__(
        self, core: Core, handlers: Mapping[str, RouteHandler], environment: Mapping[str, str] = os.environ
    ) -> None:
        """Raises InvalidArgument for an inference type that there is not."""
        self._core = core
        self._handlers = handlers
        self._default_model = environment.get("SAGEMAKER_TRITON_DEFAULT_MODEL_NAME", "")
        self._inference_type = environment.get("SAGEMAKER_TRITON_INFERENCE_TYPE", "infer")
        if self._inference_type not in INFERENCE_TYPES:
            raise InvalidArgument(
                f"Server has invalid inference type '{self._inference_type}'. Must be one of: "
                f"{', '.join(INFERENCE_TYPES)}."
            )
        self._loaded: dict[str, TargetModel] = {}

    def routes(self) -> list[Route]:
        name = "/models/(?P<model>[^/]+)"
        return [
            Route("/ping", ("GET",), Api.HEALTH, self._ping, not_allowed_type=TEXT),
            Route("/invocations", ("POST",), Api.INFERENCE, self._invocations),
            Route("/models", ("GET", "POST"), Api.MODEL_REPOSITORY, self._models),
            Route(name, ("GET", "DELETE"), Api.MODEL_REPOSITORY, self._model),
            Route(name + "/invoke", ("POST",), Api.INFERENCE, self._invoke),
            Route(".*", ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"), None, _refuse),
        ]

    async def _ping(self, http: HttpRequest, parts: PathParts) -> Reply:
        return HttpResponse(200 if self._core.is_ready() else 400, TEXT)

    async def _invocations(self, http: HttpRequest, parts: PathParts) -> Reply:
        return await self._infer(http, self._model_name())

    async def _infer(self, http: HttpRequest, model: str) -> Reply:
        handler = self._handlers[self._inference_type]
        reply = await handler(_BINARY.request(http), {"model": model, "version": ""})
        return _BINARY.reply(reply)

    def _model_name(self) -> str:
        if self._default_model:
            return self._default_model
        names = {served.name for served in self._core.registry.all_ready()}
        if len(names) != 1:
            raise InvalidArgument("SAGEMAKER_TRITON_DEFAULT_MODEL_NAME is not set and there is not just one model")
        return names.pop()

    # --- multi-model endpoints

    async def _models(self, http: HttpRequest, parts: PathParts) -> Reply:
        if http.method == "POST":
            return await self._load(http)
        ready = [name for name, loaded in self._loaded.items() if self._core.is_model_ready(loaded.name)]
        return _json({"models": [self._describe(name) for name in ready]})

    async def _model(self, http: HttpRequest, parts: PathParts) -> Reply:
        name = parts["model"]
        if name not in self._loaded:
            return HttpResponse(404, TEXT)
        return _json(self._describe(name)) if http.method == "GET" else await self._unload(name)

    def _describe(self, name: str) -> dict[str, str]:
        return {"modelName": name, "modelUrl": self._loaded[name].url}

    async def _load(self, http: HttpRequest) -> Reply:
        document = parse_json(http.body)
        if not isinstance(document, dict) or "model_name" not in document or "url" not in document:
            raise InvalidArgument("a load request needs 'model_name' and 'url'")
        name, url = as_string(document["model_name"]), as_string(document["url"])
        folder = Path(os.path.normpath(os.path.abspath(url)))
        if f"{folder}/".startswith(_FORBIDDEN):
            raise InvalidArgument(f"'url' can't be in {', '.join(_FORBIDDEN)}: {url}")
        if name in self._loaded:
            return HttpResponse(409, TEXT)
        target = target_model(folder, http.headers.get("x-amzn-sagemaker-target-model") or name)
        _logger.info("Loading SageMaker TargetModel: %s", target.name)
        self._loaded[name] = target
        self._core.source.roots.append(target)
        try:
            for member in target.members:
                await self._core.load(member)
            await self._core.load(target.name, await asyncio.to_thread(_renamed_config, target))
        except EnginehouseError as error:
            await self._withdraw(name)
            return _memory_error(error) or HttpResponse(400, JSON, (error_body(str(error)),))
        return HttpResponse(200)

    async def _unload(self, name: str) -> Reply:
        _logger.info("Unloading SageMaker TargetModel: %s", self._loaded[name].name)
        await self._withdraw(name)
        return HttpResponse(200)

    async def _withdraw(self, name: str) -> None:
        target = self._loaded[name]
        try:
            await self._core.unload(target.name, unload_dependents=True)
            for member in target.members:
                await self._core.unload(member)
        finally:
            self._core.source.roots.remove(target)
            del self._loaded[name]

    async def _invoke(self, http: HttpRequest, parts: PathParts) -> Reply:
        loaded = self._loaded.get(parts["model"])
        if loaded is None:
            return HttpResponse(404, TEXT)
        try:
            reply = await self._infer(http, http.headers.get("x-amzn-sagemaker-target-model") or loaded.name)
        except EnginehouseError as error:
            return _memory_error(error) or HttpResponse(400, JSON, (error_body(str(error)),))
        if reply.status >= 400 and isinstance(reply, HttpResponse):
            text = b"".join(map(bytes, reply.body)).decode(errors="replace")
            reply.status = 507 if _is_memory_text(text) else 400
        return reply


async def _refuse(http: HttpRequest, parts: PathParts) -> Reply:
    return HttpResponse(400, TEXT)


def _renamed_config(target: TargetModel) -> str | None:
    """The model's config under the name that it is served by; None if it has no config."""
    found = read_config(target.main)
    if found is None:
        return None
    config = found.config
    config.name = target.name
    return orjson.dumps(to_wire(config)).decode()


def _is_memory_text(text: str) -> bool:
    lowered = text.lower()
    return any(part in lowered for part in _OUT_OF_MEMORY)


def _memory_error(error: EnginehouseError) -> HttpResponse | None:
    """507 tells SageMaker to make room and to try again."""
    return HttpResponse(507, JSON, (error_body(str(error)),)) if _is_memory_text(str(error)) else None


def _json(document: Any) -> HttpResponse:
    return HttpResponse(200, body=(orjson.dumps(document),))
