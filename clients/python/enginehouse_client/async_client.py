"""The client for asyncio, on aiohttp: as many requests at once as you like, over a pool of connections."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import aiohttp

from enginehouse_client.messages import check, infer_message, model_path, outputs_of, stream_message, text_of_line
from enginehouse_client.tensors import Array


class AsyncClient:
    """Speaks to the server at "host:port": `async with AsyncClient(...) as client`. A cancelled call cancels the
    request on the server."""

    def __init__(self, address: str = "localhost:8000", *, timeout_s: float = 60.0) -> None:
        self._base = "http://" + address.removeprefix("http://").rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        """Of the server, or of a model."""
        path = f"{model_path(model, version)}/ready" if model else "/v2/health/ready"
        async with self._open.get(self._base + path) as response:
            return response.status == 200

    async def metadata(self, model: str, version: str = "") -> dict[str, Any]:
        """Inputs and outputs: name, datatype, shape."""
        async with self._open.get(self._base + model_path(model, version)) as response:
            check(response.status, b"" if response.status == 200 else await response.read())
            found: dict[str, Any] = await response.json(content_type=None)
            return found

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, object],
        outputs: Sequence[str] = (),
        *,
        version: str = "",
        parameters: Mapping[str, bool | int | str] | None = None,
        request_id: str = "",
    ) -> dict[str, Array]:
        """As Client.infer."""
        body, headers = infer_message(inputs, outputs, parameters, request_id)
        url = f"{self._base}{model_path(model, version)}/infer"
        async with self._open.post(url, data=body, headers=headers) as response:
            answer = await response.read()
            check(response.status, answer)
            return outputs_of(answer, response.headers)

    async def generate_stream(self, model: str, text: str, **sampling: object) -> AsyncIterator[str]:
        """The parts of the text as they are made. Leaving the loop early cancels the generation."""
        url = f"{self._base}{model_path(model)}/generate_stream"
        async with self._open.post(url, data=stream_message(text, sampling)) as response:
            check(response.status, b"" if response.status == 200 else await response.read())
            async for line in response.content:
                if (part := text_of_line(line, response.status)) is not None:
                    yield part

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("use the client in `async with AsyncClient(...) as client:`")
        return self._session
