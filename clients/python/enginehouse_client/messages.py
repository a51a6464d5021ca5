"""Requests and answers of the v2 protocol as bytes: what both clients share. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from enginehouse_client.tensors import Array, decode, encode

HEADER_LENGTH = "Inference-Header-Content-Length"


class ServerError(Exception):
    """The server's refusal: `status` is HTTP's, the text its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def infer_message(
    inputs: Mapping[str, object],
    outputs: Sequence[str],
    parameters: Mapping[str, bool | int | str] | None,
    request_id: str,
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an inference; tensors follow the JSON as bytes."""
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
    return body, {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}


def stream_message(text: str, sampling: Mapping[str, object]) -> bytes:
    return json.dumps({"text_input": text, "stream": True, **sampling}).encode()


def text_of_line(line: bytes, status: int) -> str | None:
    """What a line of an event stream adds to the text; None for lines between events. Raises ServerError."""
    if not line.startswith(b"data:"):
        return None
    event = json.loads(line[5:])
    if "error" in event:
        raise ServerError(status, str(event["error"]))
    return str(event["text_output"])


def model_path(model: str, version: str = "") -> str:
    return f"/v2/models/{quote(model)}" + (f"/versions/{quote(version)}" if version else "")


def check(status: int, answer: bytes) -> None:
    if status == 200:
        return
    try:
        message = str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        message = answer.decode(errors="replace") or f"HTTP status {status}"
    raise ServerError(status, message)


def outputs_of(answer: bytes, headers: Mapping[str, str]) -> dict[str, Array]:
    view = memoryview(answer)
    lowered = {key.lower(): value for key, value in headers.items()}
    offset = int(lowered.get(HEADER_LENGTH.lower(), len(answer)))
    outputs: dict[str, Array] = {}
    for entry in json.loads(answer[:offset]).get("outputs", []):
        size = entry["parameters"]["binary_data_size"]
        outputs[entry["name"]] = decode(entry, view[offset : offset + size])
        offset += size
    return outputs
