"""The client: one HTTP connection, opened when needed and again when the server closed it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from enginehouse_client.tensors import Array, decode, encode

HEADER_LENGTH = "Inference-Header-Content-Length"


class ServerError(Exception):
    """The server's refusal: `status` is HTTP's, the text its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


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
        path = f"{_model_path(model, version)}/ready" if model else "/v2/health/ready"
        status, _, _ = self._ask("GET", path)
        return status == 200

    def models(self) -> list[dict[str, Any]]:
        """The repository's index: name, version, state, reason."""
        index: list[dict[str, Any]] = self._json("POST", "/v2/repository/index")
        return index

    def metadata(self, model: str, version: str = "") -> dict[str, Any]:
        """Inputs and outputs: name, datatype, shape."""
        found: dict[str, Any] = self._json("GET", _model_path(model, version))
        return found

    def statistics(self, model: str, version: str = "") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._json("GET", f"{_model_path(model, version)}/stats")["model_stats"]
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
        encoded = [encode(name, value) for name, value in inputs.items()]
        request: dict[str, Any] = {
            "inputs": [entry for entry, _ in encoded],
            "parameters": {**(parameters or {}), "binary_data_output": True},
        }
        if outputs:
            request["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        if request_id:
            request["id"] = request_id
        head = json.dumps(request).encode()
        body = b"".join((head, *(data for _, data in encoded)))
        headers = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
        status, answer_headers, answer = self._ask("POST", f"{_model_path(model, version)}/infer", body, headers)
        _check(status, answer)
        return _outputs(answer, answer_headers)

    def generate(self, model: str, text: str, **sampling: object) -> str:
        """A language model's text: `client.generate("chat", "Once", max_tokens=20)`."""
        request = {"text_input": text, "exclude_input_in_output": True, **sampling}
        answer = self._json("POST", f"{_model_path(model)}/generate", request)
        return str(answer["text_output"])

    def generate_stream(self, model: str, text: str, **sampling: object) -> Iterator[str]:
        """The parts of the text as they are made. Leaving the loop early cancels the generation."""
        body = json.dumps({"text_input": text, "stream": True, **sampling}).encode()
        self._connection.request("POST", f"{_model_path(model)}/generate_stream", body)
        response = self._connection.getresponse()
        finished = False
        try:
            _check(response.status, b"" if response.status == 200 else response.read())
            for line in response:
                if line.startswith(b"data:"):
                    event = json.loads(line[5:])
                    if "error" in event:
                        raise ServerError(response.status, str(event["error"]))
                    yield str(event["text_output"])
            finished = True
        finally:
            if not finished:
                self._connection.close()

    # --- the connection

    def _json(self, method: str, path: str, body: object | None = None) -> Any:
        data = b"" if body is None else json.dumps(body).encode()
        status, _, answer = self._ask(method, path, data)
        _check(status, answer)
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


def _model_path(model: str, version: str = "") -> str:
    return f"/v2/models/{quote(model)}" + (f"/versions/{quote(version)}" if version else "")


def _check(status: int, answer: bytes) -> None:
    if status == 200:
        return
    try:
        message = str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        message = answer.decode(errors="replace") or f"HTTP status {status}"
    raise ServerError(status, message)


def _outputs(answer: bytes, headers: Mapping[str, str]) -> dict[str, Array]:
    view = memoryview(answer)
    lowered = {key.lower(): value for key, value in headers.items()}
    offset = int(lowered.get(HEADER_LENGTH.lower(), len(answer)))
    outputs: dict[str, Array] = {}
    for entry in json.loads(answer[:offset]).get("outputs", []):
        size = entry["parameters"]["binary_data_size"]
        outputs[entry["name"]] = decode(entry, view[offset : offset + size])
        offset += size
    return outputs
