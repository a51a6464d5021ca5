"""TLS, mutual TLS and UNIX sockets, on both protocols, with the clients that there are."""

from __future__ import annotations

import ssl
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from enginehouse.testing.server import ServerProcess

from .conftest import MODELS

ECHO = ["--model-control-mode=explicit", "--load-model=echo"]


def openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a server and a client that it vouches for."""
    folder = tmp_path_factory.mktemp("certificates")

    def path(name: str) -> str:
        return str(folder / name)

    subject = ("-subj", "/CN=authority")
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject,
            "-keyout", path("ca.key"), "-out", path("ca.crt"))  # fmt: skip
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for who in ("server", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={who}",
                "-keyout", path(f"{who}.key"), "-out", path(f"{who}.csr"))  # fmt: skip
        openssl("x509", "-req", "-days", "2", "-in", path(f"{who}.csr"), "-CA", path("ca.crt"),
                "-CAkey", path("ca.key"), "-CAcreateserial", "-extfile", path("san"),
                "-out", path(f"{who}.crt"))  # fmt: skip
    return folder


def flags_of(protocol: str, certificates: Path, *, mutual: bool) -> Sequence[str]:
    return [
        *ECHO,
        f"--{protocol}-use-ssl{'-mutual' if mutual else ''}=true",
        f"--{protocol}-server-cert={certificates / 'server.crt'}",
        f"--{protocol}-server-key={certificates / 'server.key'}",
        f"--{protocol}-root-cert={certificates / 'ca.crt'}",
    ]


def test_grpc_lets_only_known_clients_in_with_mutual_tls(certificates: Path) -> None:
    flags = flags_of("grpc", certificates, mutual=True)
    root = str(certificates / "ca.crt")
    key, chain = str(certificates / "client.key"), str(certificates / "client.crt")
    with ServerProcess([MODELS], flags) as server:
        known = {"root_certificates": root, "private_key": key, "certificate_chain": chain}
        with grpc_client.InferenceServerClient(server.grpc, ssl=True, **known) as client:
            assert client.is_server_live()
        for options in ({"ssl": True, "root_certificates": root}, {}):
            with (
                grpc_client.InferenceServerClient(server.grpc, **options) as client,
                pytest.raises(InferenceServerException),
            ):
                client.is_server_live(client_timeout=5)


def test_http_speaks_tls_with_tritons_client(certificates: Path) -> None:
    with ServerProcess([MODELS], flags_of("http", certificates, mutual=False), wait_ready=False) as server:
        trust = {"ca_certs": str(certificates / "ca.crt")}
        with http_client.InferenceServerClient(server.http, ssl=True, ssl_options=trust) as client:
            wait_for(client)
            tensor = http_client.InferInput("IN", [1, 1 << 20], "FP32")
            sent = np.arange(1 << 20, dtype=np.float32)[None]
            tensor.set_data_from_numpy(sent)
            assert (client.infer("echo", [tensor]).as_numpy("OUT") == sent).all()
        with (
            pytest.raises(OSError, match=r"(?i)reset|closed|aborted"),
            urllib.request.urlopen(f"http://{server.http}/v2"),
        ):
            pass


def test_http_lets_only_known_clients_in_with_mutual_tls(certificates: Path) -> None:
    with ServerProcess([MODELS], flags_of("http", certificates, mutual=True), wait_ready=False) as server:
        known = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
        known.load_cert_chain(certificates / "client.crt", certificates / "client.key")
        with http_client.InferenceServerClient(server.http, ssl=True, ssl_context_factory=lambda: known) as client:
            wait_for(client)
        unknown = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
        with pytest.raises(OSError), urllib.request.urlopen(f"https://{server.http}/v2", context=unknown):
            pass


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_certificate_that_is_not_there_is_named(protocol: str) -> None:
    flags = [*ECHO, f"--{protocol}-use-ssl=true", f"--{protocol}-server-cert=/no/cert.pem"]
    with ServerProcess([MODELS], flags, wait_ready=False) as server:
        assert server.process is not None
        assert server.process.wait(60) == 1
        assert "error: can't take certificate '/no/cert.pem' and key '' for TLS: No such file" in server.log


def test_unix_sockets_serve_and_a_dead_servers_socket_is_taken_over(tmp_path: Path) -> None:
    sockets = [tmp_path / "http", tmp_path / "grpc"]
    flags = [*ECHO, f"--http-address=unix:{sockets[0]}", f"--grpc-address=unix:{sockets[1]}", "--allow-metrics=false"]
    for _ in range(2):
        with (
            ServerProcess([MODELS], flags, wait_ready=False) as server,
            grpc_client.InferenceServerClient(f"unix:{sockets[1]}") as client,
        ):
            wait_for(client)
            curl = ["curl", "-sf", "--unix-socket", str(sockets[0]), "http://any/v2/models/echo/ready"]
            assert subprocess.run(curl, check=False).returncode == 0
            assert server.process is not None
            server.process.kill()
            server.process.wait()
        assert all(path.is_socket() for path in sockets)


def wait_for(client: http_client.InferenceServerClient | grpc_client.InferenceServerClient) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        try:
            if client.is_server_ready():
                return
        except (OSError, InferenceServerException):
            pass
        assert time.monotonic() < deadline_s, "the server is not ready"
        time.sleep(0.05)
