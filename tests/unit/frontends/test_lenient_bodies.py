"""Bodies and settings that are not quite right and what Triton makes of them all the same."""

from __future__ import annotations

import json

import pytest

from enginehouse.config import schema
from enginehouse.errors import InvalidArgument

from .little_server import LittleServer, echo, joined, little_server
from .test_http_infer import identity


@pytest.fixture
def server() -> LittleServer:
    return little_server({"m": (identity("FP32"), echo)})


@pytest.mark.parametrize("body", [b"[]", b"[1]", b"null", b"5", b'"x"'])
@pytest.mark.asyncio
async def test_settings_that_are_no_object_set_nothing(server: LittleServer, body: bytes) -> None:
    before = joined(await server.http("GET", "/v2/logging"))
    reply = await server.http("POST", "/v2/logging", body)
    assert (reply.status, joined(reply)) == (200, before)


@pytest.mark.asyncio
async def test_trace_settings_are_of_models_not_of_versions(server: LittleServer) -> None:
    assert (await server.http("GET", "/v2/models/m/versions/1/trace/setting")).status == 404


@pytest.mark.parametrize(
    ("key", "text"),
    [("log_info", "boolean"), ("log_verbose_level", "int32"), ("log_format", "string")],
)
@pytest.mark.asyncio
async def test_a_log_setting_without_a_value_is_refused(server: LittleServer, key: str, text: str) -> None:
    request = schema.LogSettingsRequest()
    request.settings[key].SetInParent()
    with pytest.raises(InvalidArgument, match=f"expect {text} for '{key}'"):
        await server.grpc("LogSettings", request.SerializeToString())


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"IN": [[[1]]], "id": 5}, "Unable to parse 'id': attempt to access JSON non-string as string"),
        ({"id": "x", "IN": ["a"]}, "Unable to parse 'data': attempt to access JSON non-number as double"),
    ],
)
@pytest.mark.asyncio
async def test_the_id_of_generate_is_read_before_its_tensors(server: LittleServer, document: object, text: str) -> None:
    reply = await server.http("POST", "/v2/models/m/generate", json.dumps(document).encode())
    assert json.loads(joined(reply)) == {"error": text}


@pytest.mark.asyncio
async def test_a_cuda_handle_of_the_wrong_size_is_told_as_the_driver_would(server: LittleServer) -> None:
    request = schema.CudaSharedMemoryRegisterRequest(name="r", raw_handle=b"123", byte_size=64)
    with pytest.raises(InvalidArgument, match="failed to register shared memory region: invalid args"):
        await server.grpc("CudaSharedMemoryRegister", request.SerializeToString())
