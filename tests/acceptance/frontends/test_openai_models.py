"""Models are listed, loaded and unloaded over the OpenAI API as Triton's OpenAI front end has it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from enginehouse.testing.server import ServerProcess

from .conftest import MODELS


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess([MODELS], ["--model-control-mode=explicit", "--exit-timeout-secs=5"]) as server:
        yield server


def ask(server: ServerProcess, method: str, path: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(server.http, timeout=60)
    connection.request(method, path)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text.startswith(b"{") else text


def test_a_model_is_loaded_once_and_unloaded_once(server: ServerProcess) -> None:
    assert ask(server, "GET", "/v1/models") == (200, {"object": "list", "data": []})
    status, model = ask(server, "POST", "/v1/models/echo/load")
    assert (status, model["id"], model["object"], model["owned_by"]) == (
        200, "echo", "model", "Triton Inference Server",
    )  # fmt: skip
    assert ask(server, "POST", "/v1/models/echo/load") == (400, {"detail": "model 'echo' is already loaded"})
    assert ask(server, "POST", "/v1/models/echo/unload") == (200, {"status": "success", "model": "echo"})
    assert ask(server, "POST", "/v1/models/echo/unload") == (400, {"detail": "unknown model 'echo'"})
    assert ask(server, "GET", "/v1/models/echo")[0] == 404


def test_of_those_who_load_a_model_at_once_one_does(server: ServerProcess) -> None:
    for action in ("load", "unload"):
        with ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(ask, server, "POST", f"/v1/models/echo_text/{action}") for _ in range(5)]
        assert sorted(one.result()[0] for one in asked) == [200, 400, 400, 400, 400]


def test_a_model_that_is_not_there_can_not_be_loaded(server: ServerProcess) -> None:
    status, refusal = ask(server, "POST", "/v1/models/nobody/load")
    assert (status, "failed to poll from model repository" in refusal["detail"]) == (500, True)
    assert ask(server, "POST", "/v1/models/nobody/unload") == (400, {"detail": "unknown model 'nobody'"})


@pytest.mark.parametrize(
    ("name", "status"),
    [("..", 400), ("%20%20", 400), ("%0A%09", 400), ("model/..", 404), ("/etc/passwd", 404), ("", 404), ("a%2Fb", 404)],
)
@pytest.mark.parametrize("action", ["load", "unload"])
def test_names_that_no_model_can_have_are_refused(server: ServerProcess, action: str, name: str, status: int) -> None:
    assert ask(server, "POST", f"/v1/models/{name}/{action}")[0] == status


def test_without_explicit_control_models_stay_as_they_are() -> None:
    flags = ["--openai-restricted-api", "model-repository", "key", "secret", "--exit-timeout-secs=5"]
    with ServerProcess([MODELS], flags) as server:
        for action in ("load", "unload"):
            assert ask(server, "POST", f"/v1/models/echo/{action}")[0] == 401
        assert ask(server, "GET", "/v1/models/echo")[0] == 401
    with ServerProcess([MODELS], ["--exit-timeout-secs=5"]) as server:
        for action in ("load", "unload"):
            assert ask(server, "POST", f"/v1/models/echo/{action}") == (
                400, {"detail": "Model load/unload requires --model-control-mode=explicit"},
            )  # fmt: skip
