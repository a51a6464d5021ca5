"""System shared memory over both protocols: registration, reading and writing tensors, leaving while in use."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import pytest

from enginehouse.config import schema
from enginehouse.errors import AlreadyExists, EnginehouseError, Internal, InvalidArgument, NotFound
from enginehouse.frontends.shared_memory.regions import RegionKind, Regions
from enginehouse.frontends.shared_memory.system import open_region

from .little_server import LittleServer, echo, joined, little_server
from .test_http_infer import identity

FLOATS = struct.pack("<4f", 1, 2, 3, 4)


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    block = SharedMemory(create=True, size=8192)
    assert block.buf is not None
    block.buf[16:32] = FLOATS
    yield block
    block.close()
    block.unlink()


@pytest.fixture
def server() -> LittleServer:
    return little_server({"m": (identity("FP32"), echo)})


async def post(server: LittleServer, path: str, document: Any = None) -> tuple[int, Any]:
    body = b"" if document is None else json.dumps(document).encode()
    reply = await server.http("POST", path, body)
    text = joined(reply)
    return reply.status, json.loads(text) if text else None


def request_of(region: str, offset: int, size: int, output: dict[str, Any] | None = None) -> dict[str, Any]:
    parameters = {"shared_memory_region": region, "shared_memory_offset": offset, "shared_memory_byte_size": size}
    document: dict[str, Any] = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [4], "parameters": parameters}]}
    if output is not None:
        document["outputs"] = [{"name": "OUT", "parameters": output}]
    return document


@pytest.mark.asyncio
async def test_tensors_are_read_and_written_in_place(server: LittleServer, memory: SharedMemory) -> None:
    key = "/" + memory.name
    path = "/v2/systemsharedmemory/region/r/"
    assert await post(server, path + "register", {"key": key, "offset": 8, "byte_size": 8184}) == (200, None)
    target = {"shared_memory_region": "r", "shared_memory_offset": 92, "shared_memory_byte_size": 16}
    status, answer = await post(server, "/v2/models/m/infer", request_of("r", 8, 16, target))
    assert (status, answer["outputs"]) == (200, [{"name": "OUT", "datatype": "FP32", "shape": [4]}])
    assert memory.buf is not None
    assert bytes(memory.buf[100:116]) == FLOATS
    assert await post(server, path + "unregister") == (200, None)
    status, answer = await post(server, "/v2/models/m/infer", request_of("r", 8, 16))
    assert (status, answer["error"]) == (404, "Unable to find shared memory region: 'r'")


@pytest.mark.asyncio
async def test_grpc_sees_what_http_registered(server: LittleServer, memory: SharedMemory) -> None:
    await post(server, "/v2/systemsharedmemory/region/r/register", {"key": "/" + memory.name, "byte_size": 64})
    data = await server.grpc("SystemSharedMemoryStatus", b"")
    status = schema.SystemSharedMemoryStatusResponse.FromString(data)
    assert (status.regions["r"].key, status.regions["r"].byte_size) == ("/" + memory.name, 64)


@pytest.mark.asyncio
async def test_a_region_in_use_stays_until_the_request_ends(server: LittleServer, memory: SharedMemory) -> None:
    gate = server.schedulers["m"].gate = asyncio.Event()
    await post(server, "/v2/systemsharedmemory/region/r/register", {"key": "/" + memory.name, "byte_size": 64})
    running = asyncio.create_task(post(server, "/v2/models/m/infer", request_of("r", 16, 16)))
    await asyncio.sleep(0)
    assert await post(server, "/v2/systemsharedmemory/unregister") == (200, None)
    path = "/v2/systemsharedmemory/status"
    assert len(json.loads(joined(await server.http("GET", path)))) == 1
    gate.set()
    assert (await running)[1]["outputs"][0]["data"] == [1.0, 2.0, 3.0, 4.0]
    assert json.loads(joined(await server.http("GET", path))) == []


@pytest.mark.asyncio
async def test_it_is_off_unless_allowed() -> None:
    server = little_server({"m": (identity("FP32"), echo)}, allow_client_shm=False)
    status, answer = await post(server, "/v2/systemsharedmemory/region/r/register", {"key": "/x", "byte_size": 4})
    assert (status, answer["error"][:34]) == (501, "Client shared memory is disabled. ")


@pytest.mark.parametrize(
    ("name", "key", "offset", "num_bytes", "error"),
    [
        ("new", "/enginehouse-no-such-object", 0, 4, Internal),
        ("new", "/../etc/passwd", 0, 4, Internal),
        ("new", "", 0, 4, Internal),
        ("new", None, 0, 8193, InvalidArgument),
        ("new", None, 8192, 1, InvalidArgument),
        ("new", None, 2**64 - 1, 8, InvalidArgument),
        ("old", None, 0, 4, AlreadyExists),
        ("triton_python_backend_shm_region_1", None, 0, 4, InvalidArgument),
    ],
)
def test_bad_registrations_leave_nothing_behind(
    memory: SharedMemory, name: str, key: str | None, offset: int, num_bytes: int, error: type[EnginehouseError]
) -> None:
    regions = Regions()
    there = memory.name if key is None else key
    regions.register(lambda: open_region("old", memory.name, 0, 64), "old", RegionKind.SYSTEM)
    with pytest.raises(error):
        regions.register(lambda: open_region(name, there, offset, num_bytes), name, RegionKind.SYSTEM)
    assert set(regions.by_name) == {"old"}
    regions.close()


def test_ranges_outside_a_region_are_refused(memory: SharedMemory) -> None:
    regions = Regions()
    regions.register(lambda: open_region("r", memory.name, 0, 64), "r", RegionKind.SYSTEM)
    for offset, num_bytes in ((0, 65), (64, 1), (0, 0), (2**64 - 1, 2)):
        with pytest.raises(InvalidArgument):
            regions.lease("r", offset, num_bytes)
    with pytest.raises(NotFound):
        regions.status(RegionKind.CUDA, "r")
    regions.close()


@pytest.mark.asyncio
async def test_cuda_regions_say_clearly_that_there_is_no_gpu(server: LittleServer) -> None:
    handle = {"b64": "A" * 86 + "=="}
    status, answer = await post(
        server, "/v2/cudasharedmemory/region/c/register", {"raw_handle": handle, "byte_size": 4, "device_id": 0}
    )
    assert status == 400
    assert "GPUs not supported" in answer["error"]
    with pytest.raises(InvalidArgument):
        await server.grpc(
            "CudaSharedMemoryRegister",
            schema.CudaSharedMemoryRegisterRequest(name="c", raw_handle=b"\0" * 64, byte_size=4).SerializeToString(),
        )


@pytest.mark.asyncio
@pytest.mark.parametrize("slash", ["", "/"])
async def test_memory_of_python_models_can_not_be_registered(server: LittleServer, slash: str) -> None:
    key = f"{slash}triton_python_backend_shm_region_1"
    text = f"cannot register shared memory region 'r' with key '{key}' as the key contains the reserved prefix "
    answer = await post(server, "/v2/systemsharedmemory/region/r/register", {"key": key, "byte_size": 16})
    assert answer == (400, {"error": text + "'triton_python_backend_shm_region_'"})
