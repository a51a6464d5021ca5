"""Clouds on loopback: Google's storage and the Hugging Face hub as far as their own clients ask of them.

Both serve a folder of this machine and can be told to break off answers in the middle. S3 and Azure need no
fake: moto and Azurite are servers of their own.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class FakeCloud:
    """What both have in common: a folder, a counter of breaks, and how many bytes went out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_breaks = 0
        """So many answers with content end half-way."""
        self.num_bytes_sent = 0

    def files(self) -> dict[str, bytes]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    def answer(self, request: Handler, path: str, query: dict[str, str]) -> None:
        raise NotImplementedError


class Handler(BaseHTTPRequestHandler):
    cloud: FakeCloud
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(split.query).items()}
        self.cloud.answer(self, unquote(split.path), query)

    do_HEAD = do_GET

    def send_json(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        """Obeys Range; breaks off when told to."""
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(span.group(1)) if span else 0
        end = int(span.group(2)) + 1 if span and span.group(2) else len(content)
        part = content[start:end]
        self.send_response(206 if span else 200)
        for name, value in {**headers, "Content-Length": str(len(part))}.items():
            self.send_header(name, value)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cloud.num_breaks > 0 and len(part) > 1:
            self.cloud.num_breaks -= 1
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return
        self.cloud.num_bytes_sent += len(part)
        self.wfile.write(part)


class FakeStorage(FakeCloud):
    """Google Cloud Storage's JSON API: buckets are folders."""

    def answer(self, request: Handler, path: str, query: dict[str, str]) -> None:
        match = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o(?:/(.+))?", path)
        if match is None:
            request.send_json({"error": {"code": 404, "message": path}}, 404)
            return
        bucket, name = match.groups()
        if name is None:
            request.send_json(self._listing(bucket, query))
        elif (content := self.files().get(f"{bucket}/{name}")) is None:
            request.send_json({"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}}, 404)
        elif query.get("alt") == "media":
            request.send_content(content, {"Content-Type": "application/octet-stream"})
        else:
            request.send_json(self._object(bucket, name, content))

    def _listing(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for path, content in self.files().items():
            owner, _, name = path.partition("/")
            if owner != bucket or not name.startswith(prefix):
                continue
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._object(bucket, name, content))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _object(self, bucket: str, name: str, content: bytes) -> dict[str, Any]:
        mark = hashlib.md5(content).hexdigest()
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "etag": mark,
            "generation": str(int(mark[:8], 16)),
            "updated": "2020-01-01T00:00:00.000Z",
            "timeCreated": "2020-01-01T00:00:00.000Z",
        }


class FakeHub(FakeCloud):
    """The Hugging Face hub: repositories are OWNER/NAME folders; a commit is the hash of what they hold."""

    def answer(self, request: Handler, path: str, query: dict[str, str]) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            self._answer_known(request, match.group(1), self._tree)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            self._answer_known(request, match.group(1), self._info)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            content = self.files().get(f"{match.group(1)}/{match.group(3)}", b"")
            headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": match.group(2)}
            request.send_content(content, headers)
        else:
            request.send_json({"error": path}, 404)

    def _answer_known(self, request: Handler, name: str, answer: Callable[[str], Any]) -> None:
        if (self.folder / name).is_dir():
            request.send_json(answer(name))
        else:
            request.send_response(404)
            request.send_header("X-Error-Code", "RepoNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()

    def _repository(self, name: str) -> dict[str, bytes]:
        prefix = f"{name}/"
        return {path.removeprefix(prefix): data for path, data in self.files().items() if path.startswith(prefix)}

    def _tree(self, name: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "oid": _oid(content), "size": len(content)}
            for path, content in self._repository(name).items()
        ]

    def _info(self, name: str) -> dict[str, Any]:
        files = self._repository(name)
        commit = hashlib.sha1("".join(path + _oid(content) for path, content in files.items()).encode()).hexdigest()
        return {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": []}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving(cloud: FakeCloud) -> Iterator[str]:
    """The URL under which the cloud answers inside the block."""
    handler = type("CloudHandler", (Handler,), {"cloud": cloud})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
