"""A repository in a cloud: lists it, and brings a model's folder here as it was at one moment.

A model is never seen half: files keep their identity (ETag, generation, hash) from the listing to the end of
their download, and the listing is looked at again afterwards. An interrupted download goes on where it ended.
Blocking: call it in a thread. fsspec is the only thing here that talks to a network.
"""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from io import BufferedRandom
from pathlib import Path
from typing import Any, TypeAlias

from enginehouse.errors import EnginehouseError, InvalidArgument, NotFound, Unavailable
from enginehouse.repository.credentials import Address
from enginehouse.repository.layout import Brought, Entry, belongs_to, models_in
from enginehouse.repository.snapshots import SnapshotCache, short_hash

logger = logging.getLogger("enginehouse.repository")

Filesystem: TypeAlias = Any  # fsspec has no types
NUM_PARALLEL_DOWNLOADS = 4
NUM_TRIES = 5
NUM_LOOKS = 10
CHUNK_BYTES = 8 << 20
UNUSED_S = 7 * 24 * 3600.0
"""After so long without use, a snapshot goes when room is made."""
# Other forms of the weights that a Hugging Face repository may hold beside safetensors.
_REDUNDANT_FILES = ("*.bin", "*.h5", "*.msgpack", "*.ot", "*.pth", "*.pt", "*.gguf", "*.onnx*", "*.tflite")
_REDUNDANT_FOLDERS = ("onnx/*", "openvino/*", "coreml/*", "original/*")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    path: str
    size: int
    identity: str
    """Changes with the content."""
    modified_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Listing:
    """A model's files at one moment, by relative path."""

    files: Mapping[str, RemoteFile]

    @property
    def digest(self) -> str:
        return short_hash(*((name, file.path, file.size, file.identity) for name, file in sorted(self.files.items())))

    def only(self, is_wanted: Callable[[str], bool]) -> Listing:
        return Listing({relative: file for relative, file in self.files.items() if is_wanted(relative)})

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True, slots=True)
class Clock:
    """Wall time, as storage tells when files changed, and waiting. Tests have one of their own."""

    now_s: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


class RemoteRoot:
    """storage.Root of a bucket, a container or one Hugging Face model."""

    watched_folder: Path | None = None

    def __init__(
        self,
        address: Address,
        filesystem: Filesystem,
        cache: SnapshotCache,
        *,
        settle_s: float = 1.0,
        clock: Clock | None = None,
    ) -> None:
        self.url = address.url
        self._address = address
        self._filesystem = filesystem
        self._cache = cache
        self._settle_s = settle_s
        self._clock = clock or Clock()
        self._known: list[Entry] = []

    def entries(self) -> list[Entry]:
        self._known = self._list_entries()
        return self._known

    def known_entries(self) -> list[Entry]:
        return self._known

    def _list_entries(self) -> list[Entry]:
        if self._address.kind == "hf":
            return [Entry(self._address.path.split("/")[1].split("@")[0], is_folder=True)]
        infos = self._ask(lambda: self._list_folder(self._address.path))
        found = (Entry(info["name"].rstrip("/").rsplit("/", 1)[-1], info["type"] == "directory") for info in infos)
        return [entry for entry in found if entry.name]

    def find(self, name: str) -> Entry | None:
        """As last seen; looks again for one that was not there."""
        return models_in(self._known).get(name) or models_in(self.entries()).get(name)

    def bring(self, entry: Entry, name: str) -> Brought:
        """Of a bare file, a folder that holds it and what belongs to it. Raises NotFound, Unavailable."""
        return self._bring(entry, name, is_wanted=lambda relative: True)

    def peek(self, entry: Entry, name: str) -> Brought:
        return self._bring(entry, name, is_wanted=_is_config)

    def _bring(self, entry: Entry, name: str, is_wanted: Callable[[str], bool]) -> Brought:
        for _ in range(NUM_TRIES):
            listing = self._settled_listing(entry).only(is_wanted)
            snapshot = self._cache.find(listing.digest, name)
            if snapshot is not None:
                return Brought(snapshot.path, snapshot)
            try:
                contents = self._fetch(listing, name)
            except _Changed as change:
                logger.warning("'%s' of %s changed while it was read (%s), reading it again", name, self.url, change)
                continue
            if self._list(entry).only(is_wanted).digest == listing.digest:
                snapshot = self._cache.build(listing.digest, name, contents)
                self._cache.prune(UNUSED_S)
                return Brought(snapshot.path, snapshot)
            logger.warning("'%s' of %s changed while it was read, reading it again", name, self.url)
        raise Unavailable(f"model '{name}' of {self.url} keeps changing while it is read")

    # --- listing

    def _list_folder(self, path: str) -> list[dict[str, Any]]:
        self._filesystem.invalidate_cache()
        infos: list[dict[str, Any]] = self._filesystem.ls(path, detail=True)
        return [info for info in infos if info["name"].rstrip("/") != path]

    def _settled_listing(self, entry: Entry) -> Listing:
        """A listing that stays the same for the settle time, unless nothing changed lately anyway."""
        listing = self._list(entry)
        for _ in range(NUM_LOOKS):
            newest_s = max((file.modified_s for file in listing.files.values()), default=0.0)
            if newest_s < self._clock.now_s() - self._settle_s or self._cache.find(listing.digest, entry.name):
                return listing
            self._clock.sleep(self._settle_s)
            again = self._list(entry)
            if again.digest == listing.digest:
                return listing
            listing = again
        raise Unavailable(f"'{entry.name}' of {self.url} is still being written")

    def _list(self, entry: Entry) -> Listing:
        if self._address.kind == "hf":
            prefix = self._ask(self._pinned_path)
            infos = self._ask(lambda: self._find(prefix))
            return Listing(without_redundant(_files(infos, prefix)))
        root = self._address.path
        if entry.is_folder:
            prefix = f"{root}/{entry.name}"
            files = _files(self._ask(lambda: self._find(prefix)), prefix)
        else:
            infos = [info for info in self._ask(lambda: self._list_folder(root)) if info["type"] == "file"]
            files = {
                name: file
                for name, file in _files({info["name"]: info for info in infos}, root).items()
                if name == entry.name or belongs_to(entry, Entry(name, is_folder=False))
            }
        if not files:
            raise NotFound(f"there is no '{entry.name}' in {self.url}")
        return Listing(files)

    def _find(self, prefix: str) -> dict[str, Any]:
        self._filesystem.invalidate_cache()
        infos: dict[str, Any] = self._filesystem.find(prefix, detail=True)
        return infos

    def _pinned_path(self) -> str:
        """The repository at the commit that its revision names now, so that all files are of one commit."""
        from huggingface_hub import HfApi

        name, _, revision = self._address.path.partition("@")
        api = HfApi(endpoint=self._filesystem.endpoint, token=self._filesystem.token)
        return f"{name}@{api.repo_info(name, revision=revision or None).sha}"

    # --- fetching

    def _fetch(self, listing: Listing, name: str) -> dict[str, Path]:
        logger.info(
            "fetching '%s' from %s: %d files, %.1f MB", name, self.url, len(listing.files), listing.num_bytes / 1e6
        )
        with ThreadPoolExecutor(NUM_PARALLEL_DOWNLOADS, thread_name_prefix="fetch") as pool:
            jobs = {relative: pool.submit(self._content, file) for relative, file in listing.files.items()}
            return {relative: job.result() for relative, job in jobs.items()}

    def _content(self, file: RemoteFile) -> Path:
        identity = short_hash(self._address.kind, self._address.endpoint, file.path, file.size, file.identity)
        if (known := self._cache.content_of(identity)) is not None:
            return known
        with self._cache.partial(identity) as target:
            if (known := self._cache.content_of(identity)) is not None:
                self._cache.discard_partial(identity)
                return known  # another process fetched it while this one waited
            try:
                self._download(file, target)
            except _Changed:
                self._cache.discard_partial(identity)
                raise
            return self._cache.keep(identity, target)

    def _download(self, file: RemoteFile, target: BufferedRandom) -> None:
        while (offset := target.tell()) < file.size:
            end = min(offset + CHUNK_BYTES, file.size)
            chunk = self._ask(partial(self._filesystem.cat_file, file.path, start=offset, end=end))
            if not chunk:
                raise _Changed(f"{file.path} ends at {offset} of {file.size} bytes")
            target.write(chunk[: end - offset])
        if self._address.kind != "hf":  # a commit doesn't change
            now = self._ask(lambda: self._info(file.path))
            if (now.size, now.identity) != (file.size, file.identity):
                raise _Changed(f"{file.path} is another file now")

    def _info(self, path: str) -> RemoteFile:
        self._filesystem.invalidate_cache()
        return _remote_file(self._filesystem.info(path))

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer of the storage; asks again when the network fails. Raises NotFound, Unavailable."""
        for attempt in range(1, NUM_TRIES + 1):
            try:
                return question()
            except EnginehouseError:
                raise
            except FileNotFoundError as error:
                raise NotFound(f"{self.url}: not found: {error}") from error
            except PermissionError as error:
                raise Unavailable(f"{self.url}: access denied: {error}") from error
            except Exception as error:  # every cloud's library has a tree of its own
                if attempt == NUM_TRIES or _is_refusal(error):
                    raise Unavailable(f"{self.url}: {type(error).__name__}: {error}") from error
                logger.warning("%s: %s: %s, trying again", self.url, type(error).__name__, error)
                self._clock.sleep(0.1 * 2**attempt)
        raise AssertionError("the last attempt returns or raises: a bug")


class _Changed(Exception):
    """A file is not what the listing said."""


def _is_refusal(error: Exception) -> bool:
    """Whether the storage said no, in one of the ways that clouds' libraries have to tell its HTTP status."""
    answers = (error, getattr(error, "response", None))
    statuses = [getattr(answer, name, None) for answer in answers for name in ("status_code", "code", "status")]
    return any(isinstance(status, int) and 400 <= status < 500 and status not in (408, 429) for status in statuses)


def _files(infos: Mapping[str, dict[str, Any]], prefix: str) -> dict[str, RemoteFile]:
    """By path relative to the prefix. Marker objects of folders are no files."""
    files = {}
    for path, info in infos.items():
        relative = path.removeprefix(prefix).strip("/")
        if info["type"] == "file" and relative and not path.endswith("/"):
            if ".." in relative.split("/"):
                raise InvalidArgument(f"file name '{path}' leads out of its folder")
            files[relative] = _remote_file(info)
    return files


def _remote_file(info: Mapping[str, Any]) -> RemoteFile:
    lfs = info.get("lfs")
    marks = [info.get(name) for name in ("ETag", "etag", "generation", "blob_id", "version_id")]
    marks += [lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)]
    modified = next((info[name] for name in ("LastModified", "last_modified", "updated") if info.get(name)), None)
    identity = "|".join(str(mark) for mark in marks if mark) or str(modified)
    return RemoteFile(info["name"], int(info["size"] or 0), identity, _seconds(modified))


def _seconds(modified: Any) -> float:
    if isinstance(modified, str):
        modified = datetime.fromisoformat(modified)
    return modified.timestamp() if isinstance(modified, datetime) else 0.0


def _is_config(relative: str) -> bool:
    return _matches(relative, ("config.*", "configs/*.*"))


def without_redundant(files: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    """Without other forms of the weights where there are safetensors."""
    has_safetensors = any(name.endswith(".safetensors") for name in files)
    return {
        name: file
        for name, file in files.items()
        if not name.startswith(".git")
        and not (has_safetensors and _matches(name, (*_REDUNDANT_FILES, *_REDUNDANT_FOLDERS)))
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
