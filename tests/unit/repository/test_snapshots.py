"""The cache keeps what is used, and makes room of the rest."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from enginehouse.repository.snapshots import SnapshotCache


@pytest.fixture
def cache(tmp_path: Path) -> SnapshotCache:
    return SnapshotCache(tmp_path)


def add(cache: SnapshotCache, identity: str, content: bytes) -> Path:
    with cache.partial(identity) as file:
        file.write(content)
        return cache.keep(identity, file)


def test_equal_contents_are_kept_once(cache: SnapshotCache, tmp_path: Path) -> None:
    assert add(cache, "one", b"same") == add(cache, "two", b"same")
    assert cache.content_of("two") == cache.content_of("one")
    assert len(list((tmp_path / "objects").glob("*/*"))) == 1
    assert not list((tmp_path / "partial").iterdir())


def test_contents_cannot_be_written_through_a_snapshot(cache: SnapshotCache) -> None:
    snapshot = cache.build("d", "m", {"1/file": add(cache, "one", b"x")})
    assert (snapshot.path / "1" / "file").stat().st_mode & 0o222 == 0


def test_building_twice_gives_the_same(cache: SnapshotCache, tmp_path: Path) -> None:
    content = add(cache, "one", b"x")
    assert cache.build("d", "m", {"f": content}).path == cache.build("d", "m", {"f": content}).path
    assert not list((tmp_path / "partial").iterdir())


def test_a_link_that_the_disk_refuses_becomes_a_copy(cache: SnapshotCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    snapshot = cache.build("d", "m", {"f": add(cache, "one", b"x")})
    assert (snapshot.path / "f").read_bytes() == b"x"


def test_pruning_removes_what_nobody_uses(cache: SnapshotCache, tmp_path: Path) -> None:
    used = cache.build("used", "m", {"f": add(cache, "one", b"1")})
    cache.build("unused", "m", {"f": add(cache, "two", b"2")})
    with cache.partial("interrupted") as file:
        file.write(b"half")
    gc.collect()
    cache.prune(unused_s=3600)
    assert len(list((tmp_path / "snapshots").iterdir())) == 2
    cache.prune(unused_s=-1)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["used"]
    assert used.path.is_dir()
    cache.prune(unused_s=-1)
    assert cache.content_of("two") is None
    assert cache.content_of("one") is not None
    assert not list((tmp_path / "partial").iterdir())


def test_pruning_spares_what_another_process_uses(tmp_path: Path) -> None:
    theirs, ours = SnapshotCache(tmp_path), SnapshotCache(tmp_path)
    snapshot = theirs.build("d", "m", {})
    ours.prune(unused_s=-1)
    assert snapshot.path.is_dir()
    theirs.close()
    ours.prune(unused_s=-1)
    assert not snapshot.path.exists()


def test_a_process_that_ended_leaves_no_trace(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from enginehouse.repository.snapshots import SnapshotCache; "
        "kept = SnapshotCache(Path(sys.argv[1])).build('d', 'm', {})"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert (tmp_path / "snapshots" / "d" / "m").is_dir()
    assert not list((tmp_path / "users").iterdir())
