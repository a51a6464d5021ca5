"""Repositories in clouds, through each cloud's own client library against a server on loopback."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as http

from enginehouse.repository import remote
from enginehouse.repository.definition import PollError
from enginehouse.repository.source import Repositories
from enginehouse.repository.storage import open_root
from enginehouse.testing.server import ServerProcess, free_port

from .cloud_fakes import FakeHub, FakeStorage, serving

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = {
    "config.pbtxt": b'backend: "python" max_batch_size: 0',
    "1/model.py": b"class TritonPythonModel: pass",
    "1/weights.bin": bytes(range(256)) * 400,
}
Put = Callable[[str, bytes], None]


def polled(url: str, cache: Path, environment: dict[str, str]) -> tuple[Repositories, dict[str, bytes]]:
    source = Repositories([open_root(url, download_directory=str(cache), environment=environment)])
    folder = source.poll("m", None).directory
    return source, {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def check_a_repository(url: str, put: Put, cache: Path, environment: dict[str, str]) -> None:
    """Listing, fetching, and noticing a change: the same for every cloud."""
    for name, content in MODEL.items():
        put(f"m/{name}", content)
    put("other/config.pbtxt", b"")
    source, files = polled(url, cache, environment)
    assert source.names() == ["m", "other"]
    assert files == MODEL
    before = source.poll("m", None)
    assert source.poll("m", None).same_as(before)
    put("m/2/model.py", b"class TritonPythonModel: pass  # second")
    after = source.poll("m", None)
    assert not after.same_as(before)
    assert list(after.versions) == [2]
    put("m/2/model.py", b"class TritonPythonModel: pass  # third!")
    assert (source.poll("m", None).directory / "2" / "model.py").read_bytes().endswith(b"third!")
    assert (before.directory / "1" / "weights.bin").read_bytes() == MODEL["1/weights.bin"]


# --- S3: moto


@pytest.fixture
def s3() -> Iterator[tuple[str, Put]]:
    """The URL of a new bucket on an S3 server, and how to put something into it."""
    from botocore.session import get_session
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "id", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = get_session().create_client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    bucket = f"models-{secrets.token_hex(4)}"  # moto's buckets outlive its server
    client.create_bucket(Bucket=bucket)
    try:
        yield (
            f"s3://{host}:{port}/{bucket}",
            lambda name, content: client.put_object(Bucket=bucket, Key=name, Body=content),
        )
    finally:
        client.close()
        server.stop()


def credentials(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "credentials.json"
    account = {"key_id": "id", "secret_key": "secret", "region": "us-east-1"}
    path.write_text(json.dumps({"s3": {"": {}, "s3://127.0.0.1": account}}))
    return {"TRITON_CLOUD_CREDENTIAL_PATH": str(path)}


def test_s3(s3: tuple[str, Put], tmp_path: Path) -> None:
    url, put = s3

    def put_below(name: str, content: bytes) -> None:
        put(f"folder/{name}", content)

    check_a_repository(f"{url}/folder", put_below, tmp_path / "cache", credentials(tmp_path))


ADDER = b"""
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        found = [pb_utils.get_input_tensor_by_name(request, "X").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", array + ADDED)]) for array in found]
"""
CONFIG = (
    b'backend: "python" input { name: "X" data_type: TYPE_INT32 dims: 1 } '
    b'output { name: "Y" data_type: TYPE_INT32 dims: 1 } version_policy { all { } }'
)


def ask(server: ServerProcess, version: str = "") -> int:
    client = http.InferenceServerClient(server.http)
    tensor = http.InferInput("X", [1], "INT32")
    tensor.set_data_from_numpy(np.array([1], np.int32))
    return int(client.infer("adder", [tensor], version).as_numpy("Y")[0])


def test_a_server_serves_from_s3_and_follows_it(s3: tuple[str, Put], tmp_path: Path) -> None:
    url, put = s3
    put("adder/config.pbtxt", CONFIG)
    put("adder/1/model.py", ADDER.replace(b"ADDED", b"10"))
    flags = ["--model-control-mode=poll", "--repository-poll-secs=1", f"--download-directory={tmp_path / 'cache'}"]
    with ServerProcess([url], flags, environment=credentials(tmp_path)) as server:
        assert ask(server) == 11
        put("adder/2/model.py", ADDER.replace(b"ADDED", b"20"))
        deadline_s = time.monotonic() + 30
        while ask(server) != 21:
            assert time.monotonic() < deadline_s, server.log
            time.sleep(0.1)
        assert ask(server, "1") == 11


def test_a_bucket_that_is_not_there_stops_the_start(s3: tuple[str, Put], tmp_path: Path) -> None:
    process = ServerProcess([f"{s3[0]}-nowhere"], environment=credentials(tmp_path), wait_ready=False)
    with process as server:
        assert server.process is not None
        assert server.process.wait(60) == 1
        assert "error: creating server" in server.log
        assert "nowhere" in server.log


# --- Azure: Azurite


@pytest.fixture(scope="session")
def azurite() -> Path:
    """Azurite's blob server, installed once into the checkout's cache."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("Azurite needs node and npm")
    home = REPOSITORY / ".cache" / "azurite"
    program = home / "node_modules" / ".bin" / "azurite-blob"
    if not program.exists():
        home.mkdir(parents=True, exist_ok=True)
        subprocess.run([npm, "install", "--silent", "--prefix", str(home), "azurite@3"], check=True, timeout=300)
    return program


def wait_for_port(port: int, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline_s, f"nothing listens on port {port}"
            time.sleep(0.1)


def test_azure(azurite: Path, tmp_path: Path) -> None:
    from azure.storage.blob import BlobServiceClient

    key = base64.b64encode(secrets.token_bytes(64)).decode()
    port = free_port()
    flags = ["--blobPort", str(port), "--location", str(tmp_path / "blobs"), "--silent", "--skipApiVersionCheck"]
    process = subprocess.Popen([azurite, *flags], env={**os.environ, "AZURITE_ACCOUNTS": f"account1:{key}"})
    connection = (
        f"DefaultEndpointsProtocol=http;AccountName=account1;AccountKey={key};"
        f"BlobEndpoint=http://127.0.0.1:{port}/account1;"
    )
    try:
        wait_for_port(port)
        with BlobServiceClient.from_connection_string(connection, retry_total=8) as service:
            container = service.create_container("models")

            def put(name: str, content: bytes) -> None:
                container.upload_blob(f"folder/{name}", content, overwrite=True)

            environment = {"AZURE_STORAGE_CONNECTION_STRING": connection}
            check_a_repository("as://account1/models/folder", put, tmp_path / "cache", environment)
    finally:
        process.terminate()
        process.wait(20)


# --- Google: a fake


def test_google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = FakeStorage(tmp_path / "cloud")

    def put(name: str, content: bytes) -> None:
        path = cloud.folder / "bucket" / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    with serving(cloud) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        environment = {"GOOGLE_APPLICATION_CREDENTIALS": "anon"}
        check_a_repository("gs://bucket/folder", put, tmp_path / "cache", environment)


def test_google_breaking_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that end half-way are asked for again, and nothing half is taken for whole."""
    monkeypatch.setattr(remote, "CHUNK_BYTES", 20_000)
    cloud = FakeStorage(tmp_path / "cloud")
    for name, content in MODEL.items():
        (cloud.folder / "bucket" / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (cloud.folder / "bucket" / "m" / name).write_bytes(content)
    cloud.num_breaks = 4
    with serving(cloud) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        _, files = polled("gs://bucket", tmp_path / "cache", {"GOOGLE_APPLICATION_CREDENTIALS": "anon"})
    assert files == MODEL
    assert cloud.num_breaks == 0


# --- Hugging Face: a fake


def test_hugging_face(tmp_path: Path) -> None:
    cloud = FakeHub(tmp_path / "cloud")
    model = cloud.folder / "owner" / "name"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "pytorch_model.bin").write_bytes(b"the same weights")
    with serving(cloud) as url:
        environment = {"HF_ENDPOINT": url}
        source = Repositories([open_root("hf://owner/name", download_directory=str(tmp_path), environment=environment)])
        assert source.names() == ["name"]
        found = source.poll("name", None)
        assert (found.config.backend, list(found.versions)) == ("llm", [1])
        assert sorted(path.name for path in found.directory.iterdir()) == ["config.json", "model.safetensors"]
        (model / "model.safetensors").write_bytes(b"other")
        changed = source.poll("name", None)
        assert (changed.directory / "model.safetensors").read_bytes() == b"other"
        assert (found.directory / "model.safetensors").read_bytes() == b"weights"
        nobody = open_root("hf://owner/nobody", download_directory=str(tmp_path), environment=environment)
        with pytest.raises(PollError, match="owner/nobody"):
            Repositories([nobody]).poll("nobody", None)


def test_the_fakes_are_reached_over_loopback_only(tmp_path: Path) -> None:
    with serving(FakeHub(tmp_path)) as url:
        assert url.startswith("http://127.0.0.1:")
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}/nothing", timeout=5)
