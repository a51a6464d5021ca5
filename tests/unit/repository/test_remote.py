"""A model in a cloud arrives whole, as it was at one moment, or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from enginehouse.errors import NotFound, Unavailable
from enginehouse.repository import remote
from enginehouse.repository.credentials import parse_address
from enginehouse.repository.layout import Entry
from enginehouse.repository.remote import Clock, RemoteFile, RemoteRoot, without_redundant
from enginehouse.repository.snapshots import SnapshotCache

from .bucket import Bucket

MODEL = Entry("m", is_folder=True)


@pytest.fixture
def bucket() -> Bucket:
    bucket = Bucket()
    bucket.put("b/models/m/config.pbtxt", b"max_batch_size: 1")
    bucket.put("b/models/m/1/model.onnx", bytes(range(256)) * 40)
    return bucket


def root_of(bucket: Bucket, cache: Path) -> RemoteRoot:
    clock = Clock(lambda: bucket.now_s, bucket.sleep)
    return RemoteRoot(parse_address("s3://b/models"), bucket, SnapshotCache(cache), settle_s=1.0, clock=clock)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(bucket: Bucket) -> dict[str, bytes]:
    prefix = "b/models/m/"
    return {path.removeprefix(prefix): content for path, content in bucket.files.items() if path.startswith(prefix)}


def test_a_model_arrives_whole(bucket: Bucket, tmp_path: Path) -> None:
    root = root_of(bucket, tmp_path)
    assert root.entries() == [MODEL]
    brought = root.bring(MODEL, "m")
    assert brought.folder.name == "m"
    assert content_of(brought.folder) == stored(bucket)
    assert bucket.slept_s == []


def test_what_is_here_is_not_read_again(bucket: Bucket, tmp_path: Path) -> None:
    first = root_of(bucket, tmp_path).bring(MODEL, "m")
    num_bytes = bucket.num_bytes_read
    assert root_of(bucket, tmp_path).bring(MODEL, "m").folder == first.folder
    bucket.put("b/models/m/2/model.onnx", b"second")
    second = root_of(bucket, tmp_path).bring(MODEL, "m")
    assert bucket.num_bytes_read == num_bytes + len(b"second")
    assert content_of(second.folder) == stored(bucket)
    assert not (first.folder / "2").exists()
    same = "1/model.onnx"
    assert (first.folder / same).stat().st_mtime_ns == (second.folder / same).stat().st_mtime_ns


def test_a_failing_network_is_asked_again(bucket: Bucket, tmp_path: Path) -> None:
    failures = iter([ConnectionError("gone"), TimeoutError("slow")])

    def fail(path: str, start: int) -> None:
        for failure in failures:
            raise failure

    bucket.before_read = fail
    assert content_of(root_of(bucket, tmp_path).bring(MODEL, "m").folder) == stored(bucket)
    assert len(bucket.slept_s) == 2


class Refused(Exception):
    status_code = 403


def test_a_refusal_is_not_asked_again(bucket: Bucket, tmp_path: Path) -> None:
    def refuse(path: str, start: int) -> None:
        raise Refused("no")

    bucket.before_read = refuse
    with pytest.raises(Unavailable, match=r"s3://b/models: Refused: no"):
        root_of(bucket, tmp_path).bring(MODEL, "m")
    assert bucket.slept_s == []


def test_an_interrupted_download_goes_on_where_it_ended(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    size = len(bucket.files["b/models/m/1/model.onnx"])

    def fail(path: str, start: int) -> None:
        if start >= 5000:
            raise ConnectionError("gone")

    bucket.before_read = fail
    with pytest.raises(Unavailable, match=r"s3://b/models: ConnectionError: gone"):
        root_of(bucket, tmp_path).bring(MODEL, "m")
    assert not list((tmp_path / "snapshots").iterdir())
    bucket.before_read = lambda path, start: None
    bucket.num_bytes_read = 0
    assert content_of(root_of(bucket, tmp_path).bring(MODEL, "m").folder) == stored(bucket)
    assert bucket.num_bytes_read == size - 5000


def test_a_file_that_changes_while_it_is_read_is_read_anew(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    changes = iter([b"\1" * len(bucket.files["b/models/m/1/model.onnx"])])

    def change(path: str, start: int) -> None:
        if path.endswith("model.onnx") and start == 3000:
            for content in changes:
                bucket.put(path, content)

    bucket.before_read = change
    assert content_of(root_of(bucket, tmp_path).bring(MODEL, "m").folder) == stored(bucket)


def test_a_file_that_shrinks_while_it_is_read_is_read_anew(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    changes = iter([b"short"])

    def change(path: str, start: int) -> None:
        if path.endswith("model.onnx") and start == 3000:
            for content in changes:
                bucket.put(path, content)

    bucket.before_read = change
    assert content_of(root_of(bucket, tmp_path).bring(MODEL, "m").folder) == stored(bucket)


def test_a_file_that_appears_while_others_are_read_is_not_missed(bucket: Bucket, tmp_path: Path) -> None:
    added = iter([b"late"])

    def change(path: str, start: int) -> None:
        for content in added:
            bucket.put("b/models/m/1/late.bin", content)

    bucket.before_read = change
    assert content_of(root_of(bucket, tmp_path).bring(MODEL, "m").folder)["1/late.bin"] == b"late"


def test_a_model_that_never_rests_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    bucket.before_read = lambda path, start: bucket.put("b/models/m/1/log", str(bucket.num_bytes_read).encode())
    with pytest.raises(Unavailable, match="model 'm' of s3://b/models keeps changing while it is read"):
        root_of(bucket, tmp_path).bring(MODEL, "m")


def test_a_fresh_upload_is_waited_for(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("b/models/m/1/model.onnx", b"half", age_s=0.1)
    uploads = iter([b"whole"])

    def upload() -> None:
        for content in uploads:
            bucket.put("b/models/m/1/weights.bin", content, age_s=0.0)

    bucket.on_sleep = upload
    assert content_of(root_of(bucket, tmp_path).bring(MODEL, "m").folder) == stored(bucket)
    assert bucket.slept_s == [1.0, 1.0]


def test_an_upload_that_goes_on_is_refused_for_now(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("b/models/m/1/0", b"", age_s=0.0)
    bucket.on_sleep = lambda: bucket.put(f"b/models/m/1/{len(bucket.slept_s)}", b"", age_s=0.0)
    with pytest.raises(Unavailable, match="'m' of s3://b/models is still being written"):
        root_of(bucket, tmp_path).bring(MODEL, "m")


def test_a_bare_file_brings_what_belongs_to_it(bucket: Bucket, tmp_path: Path) -> None:
    for name in ("net.onnx", "net.onnx.data", "nets.onnx", "other.txt"):
        bucket.put(f"b/models/{name}", name.encode())
    root = root_of(bucket, tmp_path)
    entry = root.find("net")
    assert entry == Entry("net.onnx", is_folder=False)
    assert sorted(content_of(root.bring(entry, "net").folder)) == ["net.onnx", "net.onnx.data"]


def test_peeking_reads_the_config_alone(bucket: Bucket, tmp_path: Path) -> None:
    root = root_of(bucket, tmp_path)
    assert list(content_of(root.peek(MODEL, "m").folder)) == ["config.pbtxt"]
    assert bucket.num_bytes_read == len(bucket.files["b/models/m/config.pbtxt"])


def test_finding_many_models_lists_the_root_once(bucket: Bucket, tmp_path: Path) -> None:
    root = root_of(bucket, tmp_path)
    root.entries()
    bucket.put("b/models/new/config.pbtxt", b"")
    listed = bucket.num_listings
    assert root.find("m") == MODEL
    assert bucket.num_listings == listed
    assert root.find("new") == Entry("new", is_folder=True)


def test_what_is_known_needs_no_network(bucket: Bucket, tmp_path: Path) -> None:
    root = root_of(bucket, tmp_path)
    assert root.known_entries() == []
    root.entries()
    bucket.files.clear()
    assert root.known_entries() == [MODEL]


def test_markers_of_folders_are_no_files(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("b/models/m/1/", b"")
    assert sorted(content_of(root_of(bucket, tmp_path).bring(MODEL, "m").folder)) == ["1/model.onnx", "config.pbtxt"]


def test_what_is_not_there_is_not_found(bucket: Bucket, tmp_path: Path) -> None:
    root = root_of(bucket, tmp_path)
    assert root.find("other") is None
    with pytest.raises(NotFound, match="there is no 'other' in s3://b/models"):
        root.bring(Entry("other", is_folder=True), "other")


def test_two_servers_share_one_download(bucket: Bucket, tmp_path: Path) -> None:
    gate = threading.Barrier(2)
    folders = []

    def bring() -> None:
        root = root_of(bucket, tmp_path)
        gate.wait()
        folders.append(root.bring(MODEL, "m").folder)

    threads = [threading.Thread(target=bring) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders[0] == folders[1]
    assert bucket.num_bytes_read == sum(map(len, stored(bucket).values()))
    assert not list((tmp_path / "partial").iterdir())


def test_only_one_form_of_the_weights_is_taken() -> None:
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", ".gitattributes", "a.gguf"]
    files = {name: RemoteFile(name, 1, "") for name in names}
    assert sorted(without_redundant(files)) == ["config.json", "model.safetensors"]
    del files["model.safetensors"]
    assert "pytorch_model.bin" in without_redundant(files)
