"""The cache of remote repositories: contents by their hash, and folders made of them.

    objects/ab/ab12…          one content, read-only, named by its SHA-256
    identities/<hash>         which content a remote file of this URL, size and ETag has
    partial/<hash>            a download in progress or interrupted; the next one goes on where it ended
    snapshots/<hash>/NAME/…   a model's folder as it was at one moment: hard links to objects
    users/<id>.lock, .digests the snapshots that a living process uses

Everything appears by renaming, so that what is there is whole; several servers may share one cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

_CANNOT_LINK = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP)


def short_hash(*parts: object) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()


class Snapshot:
    """A model's folder in the cache. It is there at least as long as this object."""

    def __init__(self, path: Path) -> None:
        self.path = path


class SnapshotCache:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("objects", "identities", "partial", "snapshots", "users"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._uses: Counter[str] = Counter()
        self._lock = threading.Lock()  # guards _uses and its file
        self._user = directory / "users" / uuid.uuid4().hex
        lock = _locked(self._user.with_suffix(".lock"), fcntl.LOCK_EX)
        self._closer = weakref.finalize(self, _forget_user, self._user, lock)

    # --- contents

    def content_of(self, identity: str) -> Path | None:
        """The content that a remote file of this identity is known to have."""
        try:
            path = self._object((self.directory / "identities" / identity).read_text())
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # its ctime says "used"
        except FileNotFoundError:
            return None
        return path

    @contextmanager
    def partial(self, identity: str) -> Iterator[BufferedRandom]:
        """The download of that file, open at its end. One at a time in all processes: may wait."""
        with _locked(self.directory / "partial" / identity, fcntl.LOCK_EX) as file:
            file.seek(0, os.SEEK_END)
            yield file

    def discard_partial(self, identity: str) -> None:
        (self.directory / "partial" / identity).unlink(missing_ok=True)

    def keep(self, identity: str, file: BufferedRandom) -> Path:
        """Makes a finished download a content. Call it inside `partial`."""
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        name = hashlib.file_digest(file, "sha256").hexdigest()
        path = self._object(name)
        partial = self.directory / "partial" / identity
        # first: who finds the partial gone must find this, or would fetch the file again
        self._write(self.directory / "identities" / identity, name)
        if path.exists():
            partial.unlink()
        else:
            path.parent.mkdir(exist_ok=True)
            partial.chmod(0o444)
            partial.rename(path)
        return path

    def _object(self, name: str) -> Path:
        return self.directory / "objects" / name[:2] / name

    def _write(self, path: Path, text: str) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self.directory / "partial", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)

    # --- snapshots

    def find(self, digest: str, name: str) -> Snapshot | None:
        """The snapshot, if it is there."""
        snapshot = self._use(digest, name)
        return snapshot if snapshot.path.is_dir() else None

    def build(self, digest: str, name: str, contents: Mapping[str, Path]) -> Snapshot:
        """A snapshot of these files, by relative path."""
        snapshot = self._use(digest, name)
        work = Path(tempfile.mkdtemp(dir=self.directory / "partial"))
        try:
            (work / name).mkdir()
            for relative, content in contents.items():
                path = work / name / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                _link(content, path)
            work.rename(self.directory / "snapshots" / digest)
        except OSError:
            if not snapshot.path.is_dir():
                raise  # else another process was faster, with the same content
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return snapshot

    def _use(self, digest: str, name: str) -> Snapshot:
        with self._lock:
            self._uses[digest] += 1
            self._tell_uses()
        folder = self.directory / "snapshots" / digest
        with contextlib.suppress(FileNotFoundError):
            os.utime(folder)
        snapshot = Snapshot(folder / name)
        weakref.finalize(snapshot, self._release, digest)
        return snapshot

    def _release(self, digest: str) -> None:
        with self._lock:
            self._uses[digest] -= 1
            if self._uses[digest] == 0:
                del self._uses[digest]
                self._tell_uses()

    def _tell_uses(self) -> None:
        if self._closer.alive:
            self._write(self._user.with_suffix(".digests"), "\n".join(self._uses))

    # --- room

    def prune(self, unused_s: float) -> None:
        """Removes snapshots, contents and interrupted downloads that nobody has used for so long."""
        before_s = time.time() - unused_s
        used = self._used()
        for folder in (self.directory / "snapshots").iterdir():
            if folder.name not in used and _is_older(folder, before_s):
                trash = Path(tempfile.mkdtemp(dir=self.directory / "partial"))
                folder.rename(trash / "snapshot")
                shutil.rmtree(trash, ignore_errors=True)
        for path in (self.directory / "objects").glob("*/*"):
            status = path.stat()
            if status.st_nlink == 1 and status.st_ctime < before_s:
                path.unlink(missing_ok=True)
        for path in (self.directory / "partial").iterdir():
            if _is_older(path, before_s):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in (self.directory / "identities").iterdir():
            if not self._object(path.read_text()).exists():
                path.unlink(missing_ok=True)

    def _used(self) -> set[str]:
        """By all living processes; forgets the dead ones."""
        used = set(self._uses)
        for lock in (self.directory / "users").glob("*.lock"):
            digests = lock.with_suffix(".digests")
            if lock.stem == self._user.name:
                continue
            with lock.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    used.update(digests.read_text().split() if digests.exists() else ())
                else:
                    digests.unlink(missing_ok=True)
                    lock.unlink(missing_ok=True)
        return used

    def close(self) -> None:
        """Another process may then prune what this one used. Happens by itself when the process ends."""
        self._closer()


def _forget_user(user: Path, lock: BufferedRandom) -> None:
    user.with_suffix(".digests").unlink(missing_ok=True)
    user.with_suffix(".lock").unlink(missing_ok=True)
    lock.close()


def _is_older(path: Path, before_s: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime < before_s
    return False


def _locked(path: Path, kind: int) -> BufferedRandom:
    """The file, open and locked. Another process may remove it while this one waits: then a new one."""
    while True:
        file = path.open("ab+")
        fcntl.flock(file, kind)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        file.close()


def _link(content: Path, path: Path) -> None:
    try:
        os.link(content, path)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        shutil.copy2(content, path)
