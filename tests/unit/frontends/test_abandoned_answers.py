"""What a model answers to a client that has left, or didn't take: none of it stays, not even until a collection."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Iterator

import pytest

from enginehouse.frontends.grpc_call import GrpcCall
from enginehouse.frontends.inference import AnswerStream
from enginehouse.types import DataType, InferRequest, InferResponse, Tensor

from .little_server import Run, little_server
from .test_grpc_infer import message

ANSWER_BYTES = 1 << 20
NUM_ANSWERS = 20
MODEL = (
    "model_transaction_policy { decoupled: true } "
    'input { name: "IN" data_type: TYPE_UINT8 dims: [-1] } output { name: "OUT" data_type: TYPE_UINT8 dims: [-1] }'
)


def answer() -> InferResponse:
    tensor = Tensor("OUT", DataType.UINT8, (ANSWER_BYTES,), memoryview(bytearray(ANSWER_BYTES)))
    return InferResponse([tensor], final=False)


@pytest.fixture
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.enable()


def kept_bytes() -> int:
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.usefixtures("_without_collector")
@pytest.mark.asyncio
async def test_a_stream_that_is_left_keeps_no_answers() -> None:
    request = InferRequest("m")
    answers = AnswerStream(request)
    assert request.sink is not None
    for _ in range(NUM_ANSWERS):
        request.sink(answer())
    assert kept_bytes() > NUM_ANSWERS * ANSWER_BYTES
    answers.close()
    for _ in range(NUM_ANSWERS):
        request.sink(answer())
    assert kept_bytes() < 2 * ANSWER_BYTES


@pytest.mark.usefixtures("_without_collector")
@pytest.mark.asyncio
async def test_a_grpc_stream_that_is_left_keeps_no_answers() -> None:
    flood: Run = lambda request: (answer() for _ in range(NUM_ANSWERS))  # noqa: E731
    server = little_server({"m": (MODEL, flood)})
    function = server.methods["/inference.GRPCInferenceService/ModelStreamInfer"].stream
    assert function is not None
    requests = iter([message("m", "UINT8", [1], b"x").SerializeToString()])
    stuck = asyncio.Event()

    async def read() -> bytes | None:
        return next(requests, None) or await asyncio.Future()

    async def write(data: bytes) -> None:
        stuck.set()
        await asyncio.Future()  # the client takes nothing

    task = asyncio.ensure_future(function(read, write, GrpcCall(())))
    await asyncio.wait_for(stuck.wait(), 10)
    assert kept_bytes() > NUM_ANSWERS * ANSWER_BYTES
    task.cancel()
    await asyncio.wait([task])
    assert kept_bytes() < 2 * ANSWER_BYTES
