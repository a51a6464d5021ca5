"""The response cache in a real Redis."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as http_client

from enginehouse.scheduling.caches import RedisCache
from enginehouse.scheduling.response_cache import CacheEntry
from enginehouse.testing.server import ServerProcess
from enginehouse.types import Tensor

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")

KEY = b"\x00key\xff"


@pytest.fixture
def redis_port() -> Iterator[int]:
    """A Redis of our own that keeps nothing on disk."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until_it_listens(port)
        yield port
    finally:
        process.terminate()
        process.wait()


def wait_until_it_listens(port: int) -> None:
    give_up_s = time.monotonic() + 20
    while True:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < give_up_s
        time.sleep(0.02)


def entry() -> CacheEntry:
    return CacheEntry.of([Tensor.from_numpy("X", np.arange(6, dtype=np.int32).reshape(2, 3))], True)


@pytest.mark.asyncio
async def test_servers_share_what_they_put_into_redis(redis_port: int) -> None:
    ours = RedisCache({"host": "127.0.0.1", "port": str(redis_port)})
    theirs = RedisCache({"host": "127.0.0.1", "port": str(redis_port)})
    assert await theirs.get(KEY) is None
    await ours.put(KEY, entry())
    found = await theirs.get(KEY)
    assert found is not None
    assert found.outputs[0].numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    await ours.close()
    await theirs.close()


@pytest.mark.asyncio
async def test_entries_expire_after_their_time_to_live(redis_port: int) -> None:
    cache = RedisCache({"host": "127.0.0.1", "port": str(redis_port), "ttl": "100"})
    await cache.put(KEY, entry())
    assert 0 < await cache._redis.ttl(RedisCache.PREFIX + KEY) <= 100
    await cache.close()


@pytest.mark.asyncio
async def test_without_redis_everything_is_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    cache = RedisCache({"host": "127.0.0.1", "port": "1", "wait_timeout": "200"})
    assert await cache.get(KEY) is None
    await cache.put(KEY, entry())
    assert "can't be read" in caplog.text
    await cache.close()


COUNTING = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.count = 0

    def execute(self, requests):
        self.count += len(requests)
        tensor = pb_utils.Tensor("N", np.array([self.count], np.int32))
        return [pb_utils.InferenceResponse([tensor]) for _ in requests]
"""

CONFIG = """backend: "python"
input [ { name: "X" data_type: TYPE_INT32 dims: [ 1 ] } ] output [ { name: "N" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ] response_cache { enable: true }
"""


def test_one_server_answers_what_another_has_computed(redis_port: int, tmp_path: Path) -> None:
    (tmp_path / "counting" / "1").mkdir(parents=True)
    (tmp_path / "counting" / "1" / "model.py").write_text(COUNTING)
    (tmp_path / "counting" / "config.pbtxt").write_text(CONFIG)
    flags = ["--cache-config=redis,host=127.0.0.1", f"--cache-config=redis,port={redis_port}"]

    def ask(server: ServerProcess, value: int) -> int:
        with http_client.InferenceServerClient(server.http) as client:
            tensor = http_client.InferInput("X", [1], "INT32").set_data_from_numpy(np.array([value], np.int32))
            return int(client.infer("counting", [tensor]).as_numpy("N").item())

    with ServerProcess([tmp_path], flags) as first, ServerProcess([tmp_path], flags) as second:
        assert [ask(first, 5), ask(first, 6), ask(first, 5)] == [1, 2, 1]
        assert ask(second, 6) == 2
        assert ask(second, 7) == 1
