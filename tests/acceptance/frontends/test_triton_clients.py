"""tritonclient unchanged: http, grpc and both asyncio clients, with shared memory and streams."""

from __future__ import annotations

import json
import queue
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http_client
import tritonclient.http.aio as http_aio
import tritonclient.utils.shared_memory as shared_memory
from tritonclient.utils import InferenceServerException

from enginehouse.testing.server import ServerProcess

FLOATS = np.arange(12, dtype=np.float32).reshape(3, 4)
MODULES = {"http": http_client, "grpc": grpc_client}


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(wire: ServerProcess, protocol: str) -> Iterator[Any]:
    address = wire.http if protocol == "http" else wire.grpc
    with MODULES[protocol].InferenceServerClient(address) as connected:
        yield connected


def tensor(module: Any, array: Any, name: str = "IN", **options: Any) -> Any:
    datatype = {"f": "FP32", "i": "INT32", "O": "BYTES"}[array.dtype.kind]
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **options)
    return made


def test_health_metadata_and_config(client: Any, protocol: str) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo")
    assert not client.is_model_ready("nobody")
    kind = {} if protocol == "http" else {"as_json": True}
    assert client.get_server_metadata(**kind)["name"] == "triton"
    metadata = client.get_model_metadata("echo", **kind)
    assert [int(size) for size in metadata["inputs"][0]["shape"]] == [-1, -1]
    config = client.get_model_config("echo", **kind)
    assert config.get("config", config)["max_batch_size"] == 8


def test_tensors_come_back(client: Any, protocol: str) -> None:
    module = MODULES[protocol]
    answer = client.infer("echo", [tensor(module, FLOATS)], request_id="seven")
    assert (answer.as_numpy("OUT") == FLOATS).all()
    response = answer.get_response()
    assert (response["id"] if protocol == "http" else response.id) == "seven"


def test_text_comes_back(client: Any, protocol: str) -> None:
    words = np.array(["caf\u00e9", "", "\U0001f600"], dtype=np.object_)
    answer = client.infer("echo_text", [tensor(MODULES[protocol], words)])
    assert [word.decode() for word in answer.as_numpy("OUT")] == words.tolist()


def test_several_requests_at_once(client: Any, protocol: str) -> None:
    arrays = [FLOATS + number for number in range(16)]
    done: queue.Queue[Any] = queue.Queue()
    if protocol == "http":
        results = [client.async_infer("echo", [tensor(http_client, array)]).get_result() for array in arrays]
    else:
        for array in arrays:
            client.async_infer(
                "echo",
                [tensor(grpc_client, array)],
                lambda result, error: done.put((result, error)),
                request_id=str(int(array[0, 0])),
            )
        answers = [done.get(timeout=20) for _ in arrays]
        assert all(error is None for _, error in answers)
        results = sorted((result for result, _ in answers), key=lambda result: int(result.get_response().id))
    for array, result in zip(arrays, results, strict=True):
        assert (result.as_numpy("OUT") == array).all()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_http_compression_both_ways(wire: ServerProcess, algorithm: str) -> None:
    with http_client.InferenceServerClient(wire.http) as client:
        answer = client.infer(
            "echo",
            [tensor(http_client, FLOATS)],
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
    assert (answer.as_numpy("OUT") == FLOATS).all()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_grpc_compression(wire: ServerProcess, algorithm: str) -> None:
    with grpc_client.InferenceServerClient(wire.grpc) as client:
        answer = client.infer("echo", [tensor(grpc_client, FLOATS)], compression_algorithm=algorithm)
    assert (answer.as_numpy("OUT") == FLOATS).all()


@pytest.mark.parametrize("binary", [True, False])
def test_http_takes_and_gives_json_or_bytes(wire: ServerProcess, binary: bool) -> None:
    with http_client.InferenceServerClient(wire.http) as client:
        output = http_client.InferRequestedOutput("OUT", binary_data=not binary)
        answer = client.infer("echo", [tensor(http_client, FLOATS, binary_data=binary)], outputs=[output])
    assert (answer.as_numpy("OUT") == FLOATS).all()


def test_errors_have_text_and_status(client: Any, protocol: str) -> None:
    module = MODULES[protocol]
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nobody' is not found"):
        client.infer("nobody", [tensor(module, FLOATS)])
    with pytest.raises(InferenceServerException, match="unexpected inference input 'X' for model 'echo'"):
        client.infer("echo", [tensor(module, FLOATS, name="X")])


def test_system_shared_memory_in_and_out(client: Any, protocol: str) -> None:
    module, size = MODULES[protocol], FLOATS.nbytes
    names = [f"{protocol}-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    handles = [shared_memory.create_shared_memory_region(name, f"/{name}", size) for name in names]
    try:
        shared_memory.set_shared_memory_region(handles[0], [FLOATS])
        for name in names:
            client.register_system_shared_memory(name, f"/{name}", size)
        status = client.get_system_shared_memory_status()
        regions = [entry["name"] for entry in status] if protocol == "http" else list(status.regions)
        assert set(names) <= set(regions)
        source = module.InferInput("IN", list(FLOATS.shape), "FP32")
        source.set_shared_memory(names[0], size)
        target = module.InferRequestedOutput("OUT")
        target.set_shared_memory(names[1], size)
        answer = client.infer("echo", [source], outputs=[target])
        assert answer.get_output("OUT") is not None
        found = shared_memory.get_contents_as_numpy(handles[1], np.float32, FLOATS.shape)
        assert (found == FLOATS).all()
        with pytest.raises(InferenceServerException, match="already in manager"):
            client.register_system_shared_memory(names[0], f"/{names[0]}", size)
    finally:
        for name, handle in zip(names, handles, strict=True):
            client.unregister_system_shared_memory(name)
            shared_memory.destroy_shared_memory_region(handle)


def test_cuda_shared_memory_says_that_there_is_no_gpu(wire: ServerProcess) -> None:
    with http_client.InferenceServerClient(wire.http) as client:
        assert client.get_cuda_shared_memory_status() == []
        with pytest.raises(InferenceServerException, match="GPUs not supported"):
            client.register_cuda_shared_memory("c", b"A" * 86 + b"==", 0, 4)


def test_models_load_with_another_config_and_unload(client: Any, protocol: str) -> None:
    kind = {} if protocol == "http" else {"as_json": True}
    override = {
        "backend": "python",
        "max_batch_size": 3,
        "input": [{"name": "IN", "data_type": "TYPE_STRING", "dims": [-1]}],
        "output": [{"name": "OUT", "data_type": "TYPE_STRING", "dims": [-1]}],
    }
    try:
        client.load_model("echo_text", config=json.dumps(override))
        loaded = client.get_model_config("echo_text", **kind)
        assert loaded.get("config", loaded)["max_batch_size"] == 3
        client.unload_model("echo_text")
        states = client.get_model_repository_index(**kind)
        entries = states if protocol == "http" else states["models"]
        [entry] = [entry for entry in entries if entry["name"] == "echo_text"]
        assert entry["state"] in ("UNLOADING", "UNAVAILABLE")
        assert not client.is_model_ready("echo_text")
    finally:
        client.load_model("echo_text")
    assert client.is_model_ready("echo_text")


def test_statistics_count(client: Any, protocol: str) -> None:
    kind = {} if protocol == "http" else {"as_json": True}

    def count() -> int:
        found = client.get_inference_statistics("echo", **kind)["model_stats"][0]
        return int(found["inference_stats"]["success"].get("count", 0))

    before = count()
    client.infer("echo", [tensor(MODULES[protocol], FLOATS)])
    assert count() == before + 1


def test_trace_and_log_settings_are_read_and_written(client: Any, protocol: str) -> None:
    kind = {} if protocol == "http" else {"as_json": True}
    assert "trace_rate" in str(client.get_trace_settings(**kind))
    assert "log_verbose_level" in str(client.update_log_settings({"log_verbose_level": 0}, **kind))


def test_sequences_keep_their_state(client: Any, protocol: str) -> None:
    module, sequence = MODULES[protocol], 4000 + (protocol == "grpc")
    sums = []
    for number in range(1, 5):
        answer = client.infer(
            "running_sum",
            [tensor(module, np.array([[number]], np.int32))],
            sequence_id=sequence,
            sequence_start=number == 1,
            sequence_end=number == 4,
        )
        sums.append(int(answer.as_numpy("OUT")[0, 0]))
    assert sums == [1, 3, 6, 10]


class Answers:
    """What a stream brings."""

    def __init__(self) -> None:
        self.found: queue.Queue[Any] = queue.Queue()

    def __call__(self, result: Any, error: Any) -> None:
        self.found.put((result, error))

    def get(self) -> tuple[Any, Any]:
        found: tuple[Any, Any] = self.found.get(timeout=20)
        return found


def test_a_decoupled_model_streams(wire: ServerProcess) -> None:
    answers = Answers()
    with grpc_client.InferenceServerClient(wire.grpc) as client:
        client.start_stream(answers)
        client.async_stream_infer(
            "repeat",
            [tensor(grpc_client, np.array([5, 6, 7], np.int32))],
            request_id="r",
            enable_empty_final_response=True,
        )
        values = [int(answers.get()[0].as_numpy("OUT")[0]) for _ in range(3)]
        final = answers.get()[0].get_response()
        client.stop_stream()
    assert values == [5, 6, 7]
    assert (final.id, final.parameters["triton_final_response"].bool_param, len(final.outputs)) == ("r", True, 0)


def test_an_error_in_a_stream_leaves_it_open(wire: ServerProcess) -> None:
    answers = Answers()
    with grpc_client.InferenceServerClient(wire.grpc) as client:
        client.start_stream(answers)
        client.async_stream_infer("repeat", [tensor(grpc_client, np.array([-1], np.int32))])
        _, error = answers.get()
        client.async_stream_infer("echo", [tensor(grpc_client, FLOATS)])
        result, problem = answers.get()
        client.stop_stream()
    assert "told to fail by -1" in str(error)
    assert problem is None
    assert (result.as_numpy("OUT") == FLOATS).all()


def test_sequences_over_a_stream(wire: ServerProcess) -> None:
    answers = Answers()
    with grpc_client.InferenceServerClient(wire.grpc) as client:
        client.start_stream(answers)
        for number in range(1, 6):
            client.async_stream_infer(
                "running_sum",
                [tensor(grpc_client, np.array([[number]], np.int32))],
                sequence_id=5000,
                sequence_start=number == 1,
                sequence_end=number == 5,
            )
        sums = [int(answers.get()[0].as_numpy("OUT")[0, 0]) for _ in range(5)]
        client.stop_stream()
    assert sums == [1, 3, 6, 10, 15]


@pytest.mark.asyncio
async def test_the_asyncio_clients(wire: ServerProcess) -> None:
    async with http_aio.InferenceServerClient(wire.http) as client:
        answer = await client.infer("echo", [tensor(http_client, FLOATS)])
        assert (answer.as_numpy("OUT") == FLOATS).all()
        assert await client.is_model_ready("echo")
    async with grpc_aio.InferenceServerClient(wire.grpc) as client:
        answer = await client.infer("echo", [tensor(grpc_client, FLOATS)])
        assert (answer.as_numpy("OUT") == FLOATS).all()

        async def requests() -> Any:
            for number in (2, 3):
                yield {
                    "model_name": "repeat",
                    "inputs": [tensor(grpc_client, np.full(number, number, np.int32))],
                }

        values = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            values.append(int(result.as_numpy("OUT")[0]))
    assert sorted(values) == [2, 2, 3, 3, 3]
