"""The client: one HTTP connection, opened when needed and again when the server closed it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from enginehouse_client.messages import check, infer_message, model_path, outputs_of, stream_message, text_of_line
from enginehouse_client.tensors import Array


class Client:
    """Speaks to the server at "host:port". Not for several threads at once: give each its own."""

    def __init__(self, address: str = "localhost:8000", *, timeout_s: float = 60.0) -> None:
        self._connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    # --- server and models

    def is_ready(self, model: str = "", version: str = "") -> bool:
        """Of the server, or of a model."""
        path = f"{model_path(model, version)}/ready" if model else "/v2/health/ready"
        status, _, _ = self._ask("GET", path)
        return status == 200

    def models(self) -> list[dict[str, Any]]:
        """The repository's index: name, version, state, reason."""
        index: list[dict[str, Any]] = self._json("POST", "/v2/repository/index")
        return index

    def metadata(self, model: str, version: str = "") -> dict[str, Any]:
        """Inputs and outputs: name, datatype, shape."""
        found: dict[str, Any] = self._json("GET", model_path(model, version))
        return found

    def statistics(self, model: str, version: str = "") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._json("GET", f"{model_path(model, version)}/stats")["model_stats"]
        return found

    def load(self, model: str, config: Mapping[str, Any] | None = None) -> None:
        """In control mode explicit. `config` replaces the model's own for this load."""
        parameters = {"config": json.dumps(config)} if config is not None else {}
        self._json("POST", f"/v2/repository/models/{quote(model)}/load", {"parameters": parameters})

    def unload(self, model: str) -> None:
        self._json("POST", f"/v2/repository/models/{quote(model)}/unload")

    # --- inference

    def infer(
        self,
        model: str,
        inputs: Mapping[str, object],
        outputs: Sequence[str] = (),
        *,
        version: str = "",
        parameters: Mapping[str, bool | int | str] | None = None,
        request_id: str = "",
    ) -> dict[str, Array]:
        """The outputs by name (all if none are named). Inputs are arrays or what numpy makes arrays of.

        Raises ServerError with the server's own text.
        """
        body, headers = infer_message(inputs, outputs, parameters, request_id)
        status, answer_headers, answer = self._ask("POST", f"{model_path(model, version)}/infer", body, headers)
        check(status, answer)
        return outputs_of(answer, answer_headers)

    def generate(self, model: str, text: str, **sampling: object) -> str:
        """A language model's text: `client.generate("chat", "Once", max_tokens=20)`."""
        request = {"text_input": text, "exclude_input_in_output": True, **sampling}
        answer = self._json("POST", f"{model_path(model)}/generate", request)
        return str(answer["text_output"])

    def generate_stream(self, model: str, text: str, **sampling: object) -> Iterator[str]:
        """The parts of the text as they are made. Leaving the loop early cancels the generation."""
        self._connection.request("POST", f"{model_path(model)}/generate_stream", stream_message(text, sampling))
        response = self._connection.getresponse()
        finished = False
        try:
            check(response.status, b"" if response.status == 200 else response.read())
            for line in response:
                if (part := text_of_line(line, response.status)) is not None:
                    yield part
            finished = True
        finally:
            if not finished:
                self._connection.close()

    # --- the connection

    def _json(self, method: str, path: str, body: object | None = None) -> Any:
        data = b"" if body is None else json.dumps(body).encode()
        status, _, answer = self._ask(method, path, data)
        check(status, answer)
        return json.loads(answer) if answer else None

    def _ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        try:
            return self._ask_once(method, path, body, headers or {})
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            # The server closed an idle connection: nothing of the request was taken.
            self._connection.close()
            return self._ask_once(method, path, body, headers or {})

    def _ask_once(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        self._connection.request(method, path, body, dict(headers))
        response = self._connection.getresponse()
        return response.status, dict(response.headers.items()), response.read()
