"""A client that closes its connection cancels what it asked for."""

from __future__ import annotations

import json
import socket
import time

import numpy as np
import pytest
import tritonclient.http as http_client

from enginehouse.testing.server import ServerProcess


def left_so_far(wire: ServerProcess) -> int:
    with http_client.InferenceServerClient(wire.http) as client:
        tensor = http_client.InferInput("IN", [1], "INT32")
        tensor.set_data_from_numpy(np.array([0], np.int32))
        return int(client.infer("patient", [tensor]).as_numpy("OUT")[0])


@pytest.mark.parametrize("endpoint", ["infer", "generate", "generate_stream"])
def test_the_model_sees_that_the_client_has_gone(wire: ServerProcess, endpoint: str) -> None:
    before = left_so_far(wire)
    document: object = {"IN": 20_000}
    if endpoint == "infer":
        document = {"inputs": [{"name": "IN", "shape": [1], "datatype": "INT32", "data": [20_000]}]}
    body = json.dumps(document).encode()
    head = f"POST /v2/models/patient/{endpoint} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", wire.http_port)) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(0.3)
    assert left_so_far(wire) == before + 1
    assert time.monotonic() - started < 10
