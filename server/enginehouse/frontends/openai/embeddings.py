"""/v1/embeddings: by an LLM engine's embedder, or by any model with an input `text` and an output `embedding`."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from enginehouse.core import Core, ServedVersion
from enginehouse.errors import InvalidArgument, NotFound
from enginehouse.frontends.http_message import HttpRequest, HttpResponse, Reply
from enginehouse.frontends.openai.errors import BadField
from enginehouse.frontends.openai.generation import run
from enginehouse.frontends.openai.handlers import not_served, prompts_of
from enginehouse.frontends.openai.requests import Int, decode
from enginehouse.frontends.tenants import TenantHeader
from enginehouse.options import ServerOptions
from enginehouse.types import GenerateRequest, GenerateTask, InferRequest, Tensor

Vector = npt.NDArray[np.float32]
_numbers = itertools.count()


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    model: str = ""
    input: str | list[Any] | None = None
    """A text, token ids, or a list of either."""
    encoding_format: str = "float"
    dimensions: Int | None = None
    user: str | None = None
    truncate_prompt_tokens: Int | None = None
    add_special_tokens: bool | None = None


class EmbeddingHandler:
    def __init__(self, core: Core, options: ServerOptions) -> None:
        self._core = core
        self._tenants = TenantHeader.of(options.tenant_header)

    async def embeddings(self, http: HttpRequest) -> Reply:
        body = decode(http.body, EmbeddingRequest)
        if body.encoding_format not in ("float", "base64"):
            raise BadField("encoding_format", f"'{body.encoding_format}' is neither float nor base64")
        served = await self._embedder(body.model)
        prompts = prompts_of(body.input, "input")
        tenant = self._tenants.tenant(http.headers.get) or body.user or ""
        if served.generative:
            vectors, num_tokens = await self._by_engine(served, body, prompts, tenant)
        else:
            vectors, num_tokens = await self._by_tensors(served, prompts, tenant), 0
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(_cut(vector, body), body)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        answer = {"object": "list", "data": data, "model": served.name, "usage": usage}
        return HttpResponse(200, body=(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY),))

    async def _embedder(self, name: str) -> ServedVersion:
        if not name:
            raise BadField("model", "is missing")
        try:
            served = await self._core.loaded_model(name)
        except (NotFound, InvalidArgument):
            raise not_served(self._core, name) from None
        if not served.generative and not _embeds_text(served):
            raise NotFound(f"The model '{name}' makes no embeddings: no input 'text' with an output 'embedding'.")
        return served

    async def _by_engine(
        self, served: ServedVersion, body: EmbeddingRequest, prompts: Sequence[str | list[int]], tenant: str
    ) -> tuple[list[Vector], int]:
        requests = [
            GenerateRequest(
                served.name,
                f"embd-{next(_numbers):x}",
                prompt,
                task=GenerateTask.EMBED,
                stream=False,
                truncate_prompt_tokens=body.truncate_prompt_tokens,
                add_special_tokens=body.add_special_tokens is not False,
                tenant=tenant,
            )
            for prompt in prompts
        ]
        events = await run(self._core, requests)
        vectors = [np.frombuffer(event.embedding, dtype="<f4") for event in events]
        return vectors, sum(event.num_prompt_tokens for event in events)

    async def _by_tensors(
        self, served: ServedVersion, prompts: Sequence[str | list[int]], tenant: str
    ) -> list[Vector]:
        texts = [prompt.encode() for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts):
            raise BadField("input", f"must be text: the model '{served.name}' takes no token ids")
        most = max(served.config.max_batch_size, 1)
        vectors: list[Vector] = []
        for first in range(0, len(texts), most):
            array = np.array([[text] for text in texts[first : first + most]], dtype=object)
            request = InferRequest(
                served.name,
                inputs={"text": Tensor.from_numpy("text", array)},
                requested_outputs=("embedding",),
                tenant=tenant,
            )
            response = await self._core.infer(request)
            if response.error is not None:
                raise response.error
            [output] = [tensor for tensor in response.outputs if tensor.name == "embedding"]
            vectors.extend(output.numpy().astype(np.float32).reshape(len(array), -1))
        return vectors


def _embeds_text(served: ServedVersion) -> bool:
    config = served.config
    inputs = {tensor.name for tensor in config.input if not tensor.optional}
    return inputs == {"text"} and "embedding" in {tensor.name for tensor in config.output}


def _cut(vector: Vector, body: EmbeddingRequest) -> Vector:
    """The first `dimensions` numbers, as long as 1 again (Matryoshka embeddings)."""
    if body.dimensions is None:
        return vector
    if not 0 < body.dimensions <= len(vector):
        raise BadField("dimensions", f"{body.dimensions} is not between 1 and the model's {len(vector)}")
    cut = vector[: body.dimensions]
    return (cut / max(float(np.linalg.norm(cut)), 1e-12)).astype(np.float32)


def _encoded(vector: Vector, body: EmbeddingRequest) -> Any:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return np.ascontiguousarray(vector)
