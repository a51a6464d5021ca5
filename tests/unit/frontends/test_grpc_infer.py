"""ModelInfer and ModelStreamInfer as bytes in and bytes out, against a real core."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest

from enginehouse.config.schema import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from enginehouse.errors import EnginehouseError, Internal, InvalidArgument, NotFound, Unsupported
from enginehouse.frontends.grpc_call import GrpcCall
from enginehouse.frontends.kserve_grpc.incoming import read_request
from enginehouse.frontends.kserve_grpc.infer_codec import decode_request, encode_response
from enginehouse.frontends.output_options import OutputOptions
from enginehouse.frontends.serving import make_regions
from enginehouse.options import ServerOptions
from enginehouse.types import DataType, InferRequest, InferResponse, Tensor

from .little_server import LittleServer, echo, little_server
from .test_http_infer import identity

DECOUPLED = identity("INT32") + " model_transaction_policy { decoupled: true }"


def count(request: InferRequest) -> list[InferResponse | EnginehouseError]:
    """The input's first number says how often the input comes back, a negative one that an error follows."""
    number = struct.unpack_from("<i", request.inputs["IN"].host_data())[0]
    answers: list[InferResponse | EnginehouseError] = [echo(request)[0] for _ in range(abs(number))]
    if number < 0:
        answers.append(NotFound("asked to fail"))
    return [*answers, InferResponse(has_response=False)]


@pytest.fixture
def server() -> LittleServer:
    models: dict[str, Any] = {kind: (identity(kind), echo) for kind in ("FP32", "INT8", "INT32", "STRING", "BOOL")}
    return little_server({**models, "count": (DECOUPLED, count)}, grpc_header_forward_pattern="^x-.*")


def message(model: str, datatype: str, shape: list[int], raw: bytes | None = None, **rest: Any) -> ModelInferRequest:
    request = ModelInferRequest(model_name=model, **rest)
    request.inputs.add(name="IN", datatype=datatype, shape=shape)
    if raw is not None:
        request.raw_input_contents.append(raw)
    return request


async def infer(server: LittleServer, request: ModelInferRequest, **metadata: str) -> ModelInferResponse:
    return ModelInferResponse.FromString(await server.grpc("ModelInfer", request.SerializeToString(), metadata))


@pytest.mark.asyncio
async def test_raw_contents_come_back(server: LittleServer) -> None:
    raw = struct.pack("<40f", *range(40))
    answer = await infer(server, message("FP32", "FP32", [40], raw, id="seven"))
    assert (answer.id, answer.model_version, list(answer.raw_output_contents)) == ("seven", "1", [raw])
    assert list(answer.outputs[0].shape) == [40]


@pytest.mark.parametrize(
    ("model", "datatype", "field", "values", "raw"),
    [
        ("FP32", "FP32", "fp32_contents", [1.5, -2], struct.pack("<2f", 1.5, -2)),
        ("INT8", "INT8", "int_contents", [-1, 300], b"\xff\x2c"),
        ("BOOL", "BOOL", "bool_contents", [True, False], b"\1\0"),
        ("STRING", "BYTES", "bytes_contents", [b"a", b"\xff"], b"\1\0\0\0a\1\0\0\0\xff"),
    ],
)
@pytest.mark.asyncio
async def test_typed_contents_become_bytes(
    server: LittleServer, model: str, datatype: str, field: str, values: list[Any], raw: bytes
) -> None:
    request = message(model, datatype, [2])
    getattr(request.inputs[0].contents, field).extend(values)
    assert list((await infer(server, request)).raw_output_contents) == [raw]


@pytest.mark.asyncio
async def test_contents_of_another_type_or_beside_raw_ones_are_refused(server: LittleServer) -> None:
    request = message("FP32", "FP32", [1])
    request.inputs[0].contents.fp64_contents.append(1)
    with pytest.raises(InvalidArgument, match="of type 'FP64', expected datatype 'FP32'"):
        await infer(server, request)
    request.raw_input_contents.append(b"\0" * 4)
    with pytest.raises(InvalidArgument, match="contents field must not be specified when using raw_input_contents"):
        await infer(server, request)


def contents(datatype: str, **values: list[Any]) -> ModelInferRequest:
    request = message("FP32", datatype, [1])
    for name, given in values.items():
        getattr(request.inputs[0].contents, name).extend(given)
    return request


def with_parameters(**parameters: int | str) -> ModelInferRequest:
    request = message("FP32", "FP32", [1], b"\0" * 4)
    for key, value in parameters.items():
        entry = request.inputs[0].parameters[key]
        if isinstance(value, str):
            entry.string_param = value
        else:
            entry.int64_param = value
    return request


@pytest.mark.asyncio
async def test_a_name_twice_is_told_before_its_data(server: LittleServer) -> None:
    request = message("FP32", "FP32", [1])
    request.inputs.add(name="IN")
    with pytest.raises(InvalidArgument, match="input 'IN' already exists in request"):
        await infer(server, request)


@pytest.mark.parametrize(
    ("request_", "error", "text"),
    [
        (message("FP32", "FP32", [1]), InvalidArgument, "unable to find data for input tensor 'IN'"),
        (message("FP32", "FLOAT", [1], b"\0" * 4), InvalidArgument, "data-type is '<invalid>', but model 'FP32'"),
        (contents("FLOAT", int_contents=[1]), InvalidArgument, "of type 'INT32', expected datatype '<invalid>'"),
        (message("FP32", "FLOAT", [1]), InvalidArgument, "unable to find data for input tensor 'IN'"),
        (with_parameters(shared_memory_offset=0), InvalidArgument, "can not be specified without 'shared_memory_reg"),
        (with_parameters(shared_memory_byte_size=0), InvalidArgument, "'shared_memory_byte_size' can not be specif"),
        (with_parameters(shared_memory_region="r"), InvalidArgument, "must be specified along with 'shared_memory_"),
        (
            with_parameters(shared_memory_region="r", shared_memory_byte_size=4, shared_memory_offset=-1),
            InvalidArgument,
            "Invalid offset for shared memory region: 'r'",
        ),
        (message("nobody", "FP32", [1], b""), NotFound, "Request for unknown model: 'nobody' is not found"),
        (message("count", "INT32", [1], b"\0" * 4), Unsupported, "ModelInfer RPC doesn't support models"),
    ],
)
@pytest.mark.asyncio
async def test_bad_requests_get_a_text_that_says_why(
    server: LittleServer, request_: ModelInferRequest, error: type[EnginehouseError], text: str
) -> None:
    with pytest.raises(error, match=text):
        await infer(server, request_)


@pytest.mark.asyncio
async def test_bytes_that_are_no_message_are_internal(server: LittleServer) -> None:
    with pytest.raises(Internal, match="Unable to parse request"):
        await server.grpc("ModelInfer", b"\xff\xff")


@pytest.mark.asyncio
async def test_metadata_that_match_become_parameters(server: LittleServer) -> None:
    seen: list[InferRequest] = []

    def note(request: InferRequest) -> list[InferResponse]:
        seen.append(request)
        return [InferResponse(parameters={"flag": True, "number": 3, "share": 0.5, "text": "t"})]

    server.schedulers["FP32"].run = note
    request = message("FP32", "FP32", [1], b"\0" * 4)
    request.parameters["mine"].int64_param = 4
    request.parameters["sequence_id"].string_param = "s"
    answer = await infer(server, request, **{"x-user": "ann", "other": "no", "x-tenant": "acme"})
    assert seen[0].parameters == {"mine": 4, "x-user": "ann", "x-tenant": "acme"}
    assert seen[0].tenant == "acme"
    assert seen[0].correlation_id == "s"
    assert answer.parameters["flag"].bool_param
    assert answer.parameters["number"].int64_param == 3
    assert answer.parameters["share"].double_param == 0.5
    assert answer.parameters["text"].string_param == "t"


@pytest.mark.parametrize("num_bytes", [0, 1, 127, 128, 300, 70_000])
def test_raw_outputs_are_written_as_protobuf_writes_them(num_bytes: int) -> None:
    server = little_server({"m": (identity("UINT8"), echo)})
    served = server.core.registry.find("m")
    tensor = Tensor("OUT", DataType.UINT8, (num_bytes,), memoryview(bytes(num_bytes)))
    response = InferResponse([tensor], model_name="m", model_version="1", id="7", parameters={"a": 1})
    message = ModelInferResponse(model_name="m", model_version="1", id="7", raw_output_contents=[bytes(num_bytes)])
    message.outputs.add(name="OUT", datatype="UINT8", shape=[num_bytes])
    message.parameters["a"].int64_param = 1
    for _ in range(2):
        assert encode_response(response, OutputOptions(), served) == message.SerializeToString()


def test_a_request_that_repeats_is_read_as_the_first_one_was() -> None:
    first, again = message("FP32", "FP32", [1], b"abcd"), message("FP32", "FP32", [1], b"efgh")
    first.id, again.id = "one", "two"
    seen = []
    for sent in (first, again):
        incoming = read_request(sent.SerializeToString())
        request, options = InferRequest("m"), OutputOptions()
        decode_request(incoming, request, options, make_regions(ServerOptions()))
        [tensor] = request.inputs.values()
        seen.append((request.id, incoming.known is not None, bytes(tensor.host_data())))
    assert seen == [("one", False, b"abcd"), ("two", True, b"efgh")]


class Stream:
    """The client's end of one ModelStreamInfer."""

    def __init__(self, server: LittleServer, **metadata: str) -> None:
        function = server.methods["/inference.GRPCInferenceService/ModelStreamInfer"].stream
        assert function is not None
        self._requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.answers: asyncio.Queue[ModelStreamInferResponse] = asyncio.Queue()

        async def write(data: bytes) -> None:
            self.answers.put_nowait(ModelStreamInferResponse.FromString(data))

        call = GrpcCall(tuple(metadata.items()))
        self.task = asyncio.ensure_future(function(self._requests.get, write, call))

    def send(self, *requests: ModelInferRequest) -> None:
        for request in requests:
            self._requests.put_nowait(request.SerializeToString())

    async def finish(self) -> list[ModelStreamInferResponse]:
        """No more requests; all answers that came."""
        self._requests.put_nowait(None)
        await self.task
        return [self.answers.get_nowait() for _ in range(self.answers.qsize())]


def counted(number: int, request_id: str, empty_final: bool = False) -> ModelInferRequest:
    request = message("count", "INT32", [1], struct.pack("<i", number), id=request_id)
    if empty_final:
        request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request


def summary(answers: list[ModelStreamInferResponse]) -> list[tuple[str, int, bool | None, str]]:
    """Id, number of outputs, final flag, error."""
    found = []
    for answer in answers:
        inner = answer.infer_response
        flagged = "triton_final_response" in inner.parameters
        final = inner.parameters["triton_final_response"].bool_param if flagged else None
        found.append((inner.id, len(inner.outputs), final, answer.error_message))
    return found


@pytest.mark.asyncio
async def test_decoupled_answers_stream_and_the_empty_final_comes_only_when_asked_for(server: LittleServer) -> None:
    stream = Stream(server)
    stream.send(counted(2, "a"))
    assert summary(await stream.finish()) == [("a", 1, False, ""), ("a", 1, False, "")]
    stream = Stream(server)
    stream.send(counted(1, "b", empty_final=True))
    assert summary(await stream.finish()) == [("b", 1, False, ""), ("b", 0, True, "")]


@pytest.mark.asyncio
async def test_an_error_is_an_answer_and_the_stream_goes_on(server: LittleServer) -> None:
    stream = Stream(server)
    stream.send(message("nobody", "INT32", [1], b"", id="x"), counted(-1, "y"))
    assert summary(await stream.finish()) == [
        ("x", 0, None, "Request for unknown model: 'nobody' is not found"),
        ("y", 1, False, ""),
        ("y", 0, False, "asked to fail"),
    ]


@pytest.mark.asyncio
async def test_an_error_of_the_model_ends_the_stream_for_who_asked_for_that(server: LittleServer) -> None:
    stream = Stream(server, triton_grpc_error="true")
    stream.send(counted(-1, "y"))
    with pytest.raises(NotFound, match="asked to fail"):
        await stream.finish()


@pytest.mark.asyncio
async def test_plain_models_answer_in_the_order_of_their_requests(server: LittleServer) -> None:
    slow = server.schedulers["INT32"].gate = asyncio.Event()
    stream = Stream(server)
    stream.send(
        message("INT32", "INT32", [1], b"\0" * 4, id="first"),
        message("FP32", "FP32", [1], b"\0" * 4, id="second"),
        counted(1, "decoupled"),
    )
    answer = await stream.answers.get()
    assert answer.infer_response.id == "decoupled"
    assert stream.answers.empty()
    slow.set()
    assert [entry[0] for entry in summary(await stream.finish())] == ["first", "second"]


@pytest.mark.asyncio
async def test_a_client_that_cancels_its_stream_cancels_its_requests(server: LittleServer) -> None:
    server.schedulers["INT32"].gate = asyncio.Event()
    stream = Stream(server)
    stream.send(message("INT32", "INT32", [1], b"\0" * 4), message("INT32", "INT32", [1], b"\0" * 4))
    for _ in range(10):
        await asyncio.sleep(0)
    stream.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream.task
    assert [request.cancelled for request in server.schedulers["INT32"].cancelled] == [True, True]
