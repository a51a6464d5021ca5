"""Good HTTP requests of every kind that the front ends know, to be spoilt."""

from __future__ import annotations

import gzip
import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

SHARED_MEMORY_KEY = f"/enginehouse_fuzz_{os.getpid()}"
"""Of this process alone: a run that was killed may have left its own behind."""
SHARED_MEMORY_BYTES = 4096
STEADY = "steady_echo"
"""A model that no spoilt request names, so that none can unload it: good requests are for it."""


@dataclass(frozen=True)
class Seed:
    """One request. `document` is its JSON, `tail` the binary data after it; `encoding` compresses both."""

    method: str
    path: str
    document: Any = None
    tail: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    encoding: str = ""
    weight: int = 1

    def packed(self, document: bytes, tail: bytes) -> tuple[dict[str, str], bytes]:
        """Headers and body for a document that may have been spoilt."""
        headers = dict(self.headers)
        if self.tail:
            headers["Inference-Header-Content-Length"] = str(len(document))
        body = document + tail
        if self.encoding:
            headers["Content-Encoding"] = self.encoding
            body = gzip.compress(body, 1) if self.encoding == "gzip" else zlib.compress(body, 1)
        return headers, body

    def json(self) -> bytes:
        return b"" if self.document is None else json.dumps(self.document, separators=(",", ":")).encode()


def _input(name: str, datatype: str, shape: list[int], **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, **more}


_FLOATS = _input("IN", "FP32", [2, 3], data=[[1.5, 2, 3], [4, 5, 6e3]])
_TEXTS = _input("IN", "BYTES", [2], data=["one", "zwölf"])
_NUMBERS = _input("IN", "INT32", [3], data=[3, 1, 2])
_FLOATS_BINARY = _input("IN", "FP32", [1, 4], parameters={"binary_data_size": 16})
_TEXTS_BINARY = _input("IN", "BYTES", [2], parameters={"binary_data_size": 13})
_IN_MEMORY = _input(
    "IN", "FP32", [1, 4], parameters={"shared_memory_region": "fuzz", "shared_memory_byte_size": 16}
)
_FLOAT_BYTES = struct.pack("<4f", 1, 2, 3, 4)
_TEXT_BYTES = struct.pack("<I3sI2s", 3, b"one", 2, b"tw")
_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}


def _infer(model: str, document: dict[str, Any], tail: bytes = b"", weight: int = 6, **more: Any) -> Seed:
    return Seed("POST", f"/v2/models/{model}/infer", document, tail, weight=weight, **more)


INFER = (
    _infer("echo", {"id": "1", "inputs": [_FLOATS], "outputs": [{"name": "OUT"}]}),
    _infer("echo", {"inputs": [_FLOATS], "outputs": [{"name": "OUT", "parameters": {"classification": 2}}]}),
    _infer("echo", {"inputs": [_FLOATS], "outputs": [{"name": "OUT", "parameters": {"binary_data": True}}]}),
    _infer("echo", {"inputs": [_FLOATS], "parameters": {"binary_data_output": True, "priority": 1, "timeout": 9}}),
    _infer("echo", {"inputs": [_FLOATS_BINARY]}, _FLOAT_BYTES, 12),
    _infer("echo", {"inputs": [_FLOATS]}, encoding="gzip"),
    _infer("echo", {"inputs": [_FLOATS_BINARY]}, _FLOAT_BYTES, encoding="deflate"),
    _infer("echo", {"inputs": [_FLOATS]}, headers={"Accept-Encoding": "gzip;q=0.5, deflate"}),
    _infer("echo", {"inputs": [_IN_MEMORY], "outputs": [{"name": "OUT", "parameters": {
        "shared_memory_region": "fuzz", "shared_memory_byte_size": 16, "shared_memory_offset": 64}}]}),
    _infer("echo_text", {"inputs": [_TEXTS]}),
    _infer("echo_text", {"inputs": [_TEXTS_BINARY]}, _TEXT_BYTES),
    _infer("repeat", {"inputs": [_NUMBERS]}, headers={"Accept": "text/event-stream"}),
    _infer("repeat", {"inputs": [_NUMBERS]}),
    _infer("running_sum", {"inputs": [_input("IN", "INT32", [1, 1], data=[5])],
                           "parameters": {"sequence_id": 9, "sequence_start": True, "sequence_end": True}}),
    _infer("tiny", {"inputs": [_input("text_input", "BYTES", [1], data=["Hi"])]}),
    Seed("POST", "/v2/models/echo/versions/1/infer", {"inputs": [_FLOATS]}, weight=2),
    Seed("POST", "/v2/models/echo/infer", None, _FLOAT_BYTES, {"Inference-Header-Content-Length": "0"}),
)  # fmt: skip
GENERATE = (
    Seed("POST", "/v2/models/echo_text/generate", {"IN": ["a", "b"]}, weight=3),
    Seed("POST", "/v2/models/repeat/generate_stream", {"IN": [1, 2]}, weight=3),
    Seed("POST", "/v2/models/tiny/generate", {"text_input": "Hi", "max_tokens": 2, "temperature": 0}),
    Seed("POST", "/v2/models/tiny/generate_stream", {"text_input": "Hi", "max_tokens": 2, "stream": True}),
)
OPENAI = (
    Seed("POST", "/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 2, "logprobs": 1, "echo": True}),
    Seed("POST", "/v1/completions", {"model": "tiny", "prompt": [72, 105], "max_tokens": 2, "n": 2, "stop": ["x"]}),
    Seed("POST", "/v1/chat/completions", {**_CHAT, "logprobs": True, "top_logprobs": 1, "seed": 1}),
    Seed("POST", "/v1/chat/completions", {**_CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    Seed("POST", "/tokenize", {"model": "tiny", "prompt": "Hi"}),
    Seed("POST", "/detokenize", {"model": "tiny", "tokens": [72, 105]}),
    Seed("GET", "/v1/models"),
    Seed("GET", "/v1/models/tiny"),
)
CONTROL = (
    Seed("POST", "/v2/repository/index", {"ready": True}),
    Seed("GET", "/v2/trace/setting"),
    Seed("POST", "/v2/trace/setting", {"trace_level": ["OFF"], "trace_rate": "1000", "log_frequency": None}),
    Seed("POST", "/v2/models/echo/trace/setting", {"trace_rate": "500"}),
    Seed("POST", "/v2/logging", {"log_verbose_level": 0, "log_info": False, "log_format": "default"}),
    Seed("GET", "/v2/systemsharedmemory/status"),
    Seed("POST", "/v2/systemsharedmemory/region/fuzz/register",
         {"key": SHARED_MEMORY_KEY, "offset": 0, "byte_size": SHARED_MEMORY_BYTES}, weight=2),
    Seed("POST", "/v2/systemsharedmemory/region/fuzz/unregister"),
    Seed("GET", "/v2/cudasharedmemory/region/fuzz/status"),
    Seed("POST", "/v2/cudasharedmemory/region/fuzz/register",
         {"raw_handle": {"b64": "A" * 88}, "device_id": 0, "byte_size": 64}),
)  # fmt: skip
LOAD = (
    Seed("POST", "/v2/repository/models/echo_text/load", {"parameters": {"config": '{"backend":"python"}'}}),
    Seed("POST", "/v2/repository/models/echo_text/unload", {"parameters": {"unload_dependents": True}}),
)
LOOKS = tuple(
    Seed("GET", path)
    for path in (
        "/", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/echo", "/v2/models/echo/versions/1",
        "/v2/models/echo/config", "/v2/models/stats", "/v2/models/repeat/stats", "/v2/models/echo/ready", "/health",
        "/ping", "/version",
    )
)  # fmt: skip
SEEDS = INFER + GENERATE + OPENAI + CONTROL + LOOKS
WEIGHTS = [seed.weight for seed in SEEDS]
