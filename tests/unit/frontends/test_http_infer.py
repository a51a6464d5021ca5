"""The HTTP codec: what goes in as JSON or bytes comes out right, and bad bodies get the texts clients know."""

from __future__ import annotations

import gzip
import json
import math
import struct
import zlib
from typing import Any

import pytest

from enginehouse.frontends.http_message import HttpResponse
from enginehouse.types import InferRequest, InferResponse

from .little_server import LittleServer, echo, joined, little_server


def identity(type_name: str, dims: str = "-1", max_batch_size: int = 0) -> str:
    return (
        f"max_batch_size: {max_batch_size} "
        f'input {{ name: "IN" data_type: TYPE_{type_name} dims: [{dims}] }} '
        f'output {{ name: "OUT" data_type: TYPE_{type_name} dims: [{dims}] }}'
    )


@pytest.fixture
def server() -> LittleServer:
    kinds = ("FP16", "FP32", "FP64", "BOOL", "STRING", "INT8", "INT64", "UINT8", "UINT64")
    return little_server({kind: (identity(kind), echo) for kind in kinds})


def body_of(datatype: str, shape: list[int], **rest: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "IN", "datatype": datatype, "shape": shape, **rest}]}


async def infer(server: LittleServer, model: str, document: Any, tail: bytes = b"") -> tuple[int, Any]:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))} if tail else {}
    reply = await server.http("POST", f"/v2/models/{model}/infer", text + tail, headers)
    return reply.status, json.loads(joined(reply))


@pytest.mark.parametrize(
    ("model", "datatype", "data"),
    [
        ("FP32", "FP32", [0.5, -2.0, 3.0]),
        ("FP64", "FP64", [0.1, 1e300, -0.0]),
        ("BOOL", "BOOL", [True, False, True]),
        ("STRING", "BYTES", ["a", "", "caf\u00e9 \U0001f600"]),
        ("INT8", "INT8", [-128, 0, 127]),
        ("INT64", "INT64", [-(2**63), 0, 2**63 - 1]),
        ("UINT64", "UINT64", [0, 1, 2**64 - 1]),
    ],
)
@pytest.mark.asyncio
async def test_json_values_come_back_as_they_went(
    server: LittleServer, model: str, datatype: str, data: list[Any]
) -> None:
    status, answer = await infer(server, model, body_of(datatype, [3], data=data))
    assert status == 200
    assert answer["outputs"][0] == {"name": "OUT", "datatype": datatype, "shape": [3], "data": data}


@pytest.mark.parametrize("num_elements", [10, 400_000])  # the second is parsed in a thread, by another parser
@pytest.mark.asyncio
async def test_long_json_is_read_and_refused_as_short_one(server: LittleServer, num_elements: int) -> None:
    def text(last: str, closing: str = "]}]}") -> bytes:
        head = f'{{"inputs":[{{"name":"IN","datatype":"FP32","shape":[{num_elements}],"data":['
        return (head + "0.1, " * (num_elements - 1) + last + closing).encode()

    status, answer = await infer(server, "FP32", text("-1e-3"))
    data = answer["outputs"][0]["data"]
    assert (status, len(data), data[0], data[-1]) == (200, num_elements, 0.10000000149011612, -0.0010000000474974513)
    _, answer = await infer(server, "FP32", text("NaN"))
    assert math.isnan(answer["outputs"][0]["data"][-1])
    unclosed = text("1", "]}")
    assert await infer(server, "FP32", unclosed) == (
        500,
        {
            "error": "failed to parse the request JSON buffer: Missing a comma or ']' after an array element. "
            f"at {len(unclosed)}"
        },
    )
    status, answer = await infer(server, "FP32", text('"1"'))
    assert (status, answer["error"]) == (500, "Unable to parse 'data': attempt to access JSON non-number as double")
    packed = gzip.compress(text("2"))
    reply = await server.http("POST", "/v2/models/FP32/infer", packed, {"Content-Encoding": "gzip"})
    assert json.loads(joined(reply))["outputs"][0]["data"][-1] == 2.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b'{"a":"\x01"}', "Invalid escape character in string. at 6"),
        (b'{"a":"\\q"}', "Invalid escape character in string. at 6"),
        (b'{"a":"\xff"}', "Invalid encoding in string. at 6"),
        (b"\xff", "Invalid value. at 0"),
    ],
)
@pytest.mark.asyncio
async def test_what_is_no_json_is_complained_of_in_tritons_words(
    server: LittleServer, text: bytes, complaint: str
) -> None:
    status, answer = await infer(server, "FP32", text)
    assert (status, answer["error"]) == (500, f"failed to parse the request JSON buffer: {complaint}")


@pytest.mark.asyncio
async def test_nan_and_infinity_go_both_ways(server: LittleServer) -> None:
    text = b'{"inputs":[{"name":"IN","datatype":"FP32","shape":[3],"data":[NaN,Infinity,1e39]}]}'
    _, answer = await infer(server, "FP32", text)
    first, second, third = answer["outputs"][0]["data"]
    assert math.isnan(first)
    assert (second, third) == (math.inf, math.inf)


@pytest.mark.asyncio
async def test_nesting_is_ignored_even_where_it_is_ragged(server: LittleServer) -> None:
    _, answer = await infer(server, "INT64", body_of("INT64", [4], data=[[1, [2]], 3, [[[4]]]]))
    assert answer["outputs"][0]["data"] == [1, 2, 3, 4]


@pytest.mark.asyncio
async def test_nesting_has_a_limit(server: LittleServer) -> None:
    deep: Any = 1
    for _ in range(101):
        deep = [deep]
    status, answer = await infer(server, "INT64", body_of("INT64", [1], data=deep))
    assert status == 400
    assert answer["error"] == "JSON nesting depth exceeds maximum allowed limit (100)"


@pytest.mark.asyncio
async def test_narrow_integers_wrap_and_negative_unsigned_ones_fail(server: LittleServer) -> None:
    _, answer = await infer(server, "INT8", body_of("INT8", [1], data=[300]))
    assert answer["outputs"][0]["data"] == [44]
    status, answer = await infer(server, "UINT8", body_of("UINT8", [1], data=[-1]))
    assert (status, answer["error"]) == (
        500,
        "Unable to parse 'data': attempt to access JSON non-unsigned-integer as unsigned-integer",
    )


@pytest.mark.parametrize(
    ("document", "status", "text"),
    [
        (b"{", 500, "failed to parse the request JSON buffer: Missing a name for object member. at 1"),
        (b"[1]", 500, "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
        (b"[" * 5000, 400, "JSON nesting depth exceeds maximum allowed limit (100)"),
        (b'{"id": 1, "inputs": []}', 500, "Unable to parse 'id': attempt to access JSON non-string as string"),
        (body_of("FP32", [2], data=[1, 2, 3]), 500, "Unable to parse 'data': Shape does not match true shape"),
        (body_of("FP32", [1], data=["x"]), 500, "attempt to access JSON non-number as double"),
        (body_of("FP32", [1], data=[10**400]), 500, "attempt to access JSON non-number as double"),
        (body_of("FP31", [1], data=[1]), 400, "invalid datatype for input IN"),
        (body_of("FP32", [-1], data=[1]), 500, "attempt to access JSON non-unsigned-integer"),
        (body_of("FP32", [1]), 400, "But no field is set"),
        (b'{"id": "\xff"}', 500, "Invalid encoding in string. at 8"),
        (b'{"inputs": []} \xff', 500, "The document root must not be followed by other values. at 15"),
        (b'{"inputs": []}\0\xff', 400, "expected 1 inputs but got 0 inputs"),
        (body_of("FP32", [1], data=[1], parameters={"shared_memory_offset": 1.5}), 500, "'shared_memory_offset'"),
        (body_of("FP31", [0], data=[]), 400, "data-type is '<invalid>', but model 'FP32' expects 'FP32'"),
    ],
)
@pytest.mark.asyncio
async def test_a_bad_body_gets_a_text_that_says_what_is_wrong(
    server: LittleServer, document: Any, status: int, text: str
) -> None:
    found, answer = await infer(server, "FP32", document)
    assert (found, text in answer["error"]) == (status, True), answer


@pytest.mark.asyncio
async def test_a_name_twice_is_refused(server: LittleServer) -> None:
    document = body_of("FP32", [1], data=[1])
    document["inputs"] *= 2
    status, answer = await infer(server, "FP32", document | {"id": "seven"})
    assert (status, answer["error"]) == (400, "[request id: seven] input 'IN' already exists in request")


@pytest.mark.asyncio
async def test_what_packed_a_body_is_read_from_the_body(server: LittleServer) -> None:
    body = json.dumps(body_of("FP32", [1], data=[1])).encode()
    for packed in (gzip.compress(body), zlib.compress(body)):
        for encoding in ("gzip", "deflate"):
            reply = await server.http("POST", "/v2/models/FP32/infer", packed, {"Content-Encoding": encoding})
            assert reply.status == 200
    reply = await server.http("POST", "/v2/models/FP32/infer", b"", {"Content-Encoding": "gzip"})
    assert (reply.status, joined(reply)) == (400, b'{"error":"nothing to be decompressed"}')
    reply = await server.http("POST", "/v2/models/FP32/infer", body, {"Content-Encoding": ""})
    assert reply.status == 501


@pytest.mark.asyncio
async def test_binary_tensors_follow_the_json(server: LittleServer) -> None:
    data = struct.pack("<2e", 1.5, 2.0)
    document = body_of("FP16", [2], parameters={"binary_data_size": 4})
    document["parameters"] = {"binary_data_output": True}
    text = json.dumps(document).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    reply = await server.http("POST", "/v2/models/FP16/infer", text + data, headers)
    assert isinstance(reply, HttpResponse)
    assert reply.content_type == "application/octet-stream"
    length = int(dict(reply.headers)["Inference-Header-Content-Length"])
    body = joined(reply)
    assert json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 4}
    assert body[length:] == data


@pytest.mark.asyncio
async def test_too_few_and_too_many_bytes_are_refused(server: LittleServer) -> None:
    document = body_of("FP32", [2], parameters={"binary_data_size": 8})
    _, answer = await infer(server, "FP32", document, b"\0" * 6)
    assert answer["error"] == "unexpected size for input 'IN', expecting 2 additional bytes for model 'FP32'"
    _, answer = await infer(server, "FP32", document, b"\0" * 9)
    assert answer["error"] == "unexpected additional input data for model 'FP32'"


@pytest.mark.asyncio
async def test_a_raw_body_is_the_only_input(server: LittleServer) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    reply = await server.http("POST", "/v2/models/INT8/infer", b"\1\2\3", headers)
    assert joined(reply).endswith(b"\1\2\3")
    reply = await server.http("POST", "/v2/models/STRING/infer", b"abc", headers)
    assert "must have input shape [1]" in json.loads(joined(reply))["error"]


@pytest.mark.asyncio
async def test_errors_of_the_model_are_plain_text_and_those_of_the_body_json() -> None:
    def fail(request: InferRequest) -> list[Any]:
        from enginehouse.errors import Unavailable

        return [Unavailable("tired")]

    server = little_server({"m": (identity("FP32"), fail)})
    good = json.dumps(body_of("FP32", [1], data=[1])).encode()
    reply = await server.http("POST", "/v2/models/m/infer", good)
    assert (reply.status, reply.content_type, json.loads(joined(reply))) == (503, "text/plain", {"error": "tired"})
    reply = await server.http("POST", "/v2/models/m/infer", b"{}")
    assert (reply.status, reply.content_type) == (500, "application/json")
    reply = await server.http("POST", "/v2/models/nobody/infer", good)
    assert (reply.status, reply.content_type) == (404, "text/plain")


@pytest.mark.asyncio
async def test_parameters_and_forwarded_headers_reach_the_model() -> None:
    seen: list[InferRequest] = []

    def note(request: InferRequest) -> list[InferResponse]:
        seen.append(request)
        return [InferResponse()]

    server = little_server({"m": (identity("FP32"), note)}, http_header_forward_pattern="^x-fwd-.*")
    document = body_of("FP32", [1], data=[1])
    document["parameters"] = {
        "sequence_id": "s", "sequence_start": True, "priority": 3, "timeout": 9, "mine": 0.5, "X-Fwd-A": "body",
    }  # fmt: skip
    headers = {"X-Fwd-A": "header", "Y": "no", "X-Tenant": "ann"}
    await server.http("POST", "/v2/models/m/infer", json.dumps(document).encode(), headers)
    [request] = seen
    assert (request.correlation_id, request.sequence_start, request.priority, request.timeout_us) == (
        "s", True, 3, 9,
    )  # fmt: skip
    assert request.parameters == {"mine": 0.5, "X-Fwd-A": "header"}
    assert request.tenant == "ann"
