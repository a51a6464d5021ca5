"""The client that we ship, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from enginehouse.testing.server import ServerProcess
from enginehouse_client import AsyncClient, Client, ServerError

EXAMPLES = Path(__file__).resolve().parents[2] / "model_repository"
WANTED = ("add_sub", "identity", "tokenizer")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    flags = ["--model-control-mode=explicit", *(f"--load-model={name}" for name in WANTED)]
    with ServerProcess([EXAMPLES], flags) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.http) as connected:
        yield connected


def test_arrays_go_in_and_come_out(client: Client) -> None:
    metadata = client.metadata("add_sub")
    dtype = {"INT32": np.int32, "FP32": np.float32}[metadata["inputs"][0]["datatype"]]
    shape = [abs(size) for size in metadata["inputs"][0]["shape"]]
    one = np.full(shape, 7, dtype)
    names = [entry["name"] for entry in metadata["inputs"]]
    outputs = client.infer("add_sub", {names[0]: one, names[1]: one})
    assert sorted(int(values.flat[0]) for values in outputs.values()) == [0, 14]


def test_only_the_outputs_asked_for_come_back(client: Client) -> None:
    text = client.metadata("tokenizer")
    name = text["outputs"][0]["name"]
    outputs = client.infer("tokenizer", {text["inputs"][0]["name"]: [["a cat"], ["sat"]]}, [name])
    assert list(outputs) == [name]
    assert outputs[name].shape[0] == 2


def test_refusals_carry_the_servers_text_and_leave_the_connection_usable(client: Client) -> None:
    with pytest.raises(ServerError, match="'nobody' is not found") as caught:
        client.infer("nobody", {"X": [1]})
    assert caught.value.status == 404
    assert client.is_ready("identity")


def test_types_that_the_protocol_lacks_are_named(client: Client) -> None:
    with pytest.raises(TypeError, match="complex128"):
        client.infer("identity", {"INPUT0": np.zeros(1, complex)})


def test_models_are_listed_loaded_and_unloaded(client: Client) -> None:
    client.unload("identity")
    client.load("identity")
    states = {entry["name"]: entry.get("state") for entry in client.models()}
    assert states["identity"] == "READY"
    assert client.statistics("identity")[0]["name"] == "identity"


@pytest.mark.asyncio
async def test_many_requests_at_once_get_each_its_own_answer(server: ServerProcess) -> None:
    async with AsyncClient(server.http) as client:
        assert await client.is_ready("identity")
        rows = [np.full((1, 3), number, np.float32) for number in range(50)]
        answers = await asyncio.gather(*(client.infer("identity", {"INPUT0": row}) for row in rows))
    assert all((answer["OUTPUT0"] == row).all() for answer, row in zip(answers, rows, strict=True))


@pytest.mark.asyncio
async def test_the_asyncio_client_raises_the_servers_refusal(server: ServerProcess) -> None:
    async with AsyncClient(server.http) as client:
        with pytest.raises(ServerError, match="'nobody' is not found"):
            await client.metadata("nobody")
