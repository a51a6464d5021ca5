"""Model repositories as folders: one here stays where it is, one in a cloud is brought here model by model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from enginehouse.config.backends import FORMAT_BY_SUFFIX
from enginehouse.errors import InvalidArgument
from enginehouse.repository.credentials import (
    CREDENTIAL_VARIABLE,
    Address,
    filesystem_options,
    is_remote,
    parse_address,
)
from enginehouse.repository.layout import Brought, Entry, models_in
from enginehouse.repository.remote import RemoteRoot
from enginehouse.repository.snapshots import SnapshotCache

_PROTOCOLS = {"s3": ("s3", "s3"), "gs": ("gs", "gcs"), "as": ("abfs", "azure"), "hf": ("hf", "hf")}
_MOUNT_VARIABLES = {
    "s3": "TRITON_AWS_MOUNT_DIRECTORY",
    "gs": "TRITON_GCS_MOUNT_DIRECTORY",
    "as": "TRITON_AZURE_MOUNT_DIRECTORY",
}


class Root(Protocol):
    """One model repository. Blocking: call it in a thread."""

    url: str
    watched_folder: Path | None
    """Where changes can be noticed; None must be looked at."""

    def entries(self) -> list[Entry]:
        """What is at the top."""
        ...

    def known_entries(self) -> list[Entry]:
        """As last seen: never waits for a network."""
        ...

    def find(self, name: str) -> Entry | None:
        """The entry of the model of that name."""
        ...

    def bring(self, entry: Entry, name: str) -> Brought:
        """Raises NotFound, Unavailable."""
        ...

    def peek(self, entry: Entry, name: str) -> Brought:
        """At least the config files of a model's folder. Raises NotFound, Unavailable."""
        ...


class LocalRoot:
    def __init__(self, path: Path) -> None:
        self.url = str(path)
        self.path = path
        self.watched_folder: Path | None = path

    def entries(self) -> list[Entry]:
        if not self.path.is_dir():
            return []
        return [Entry(entry.name, entry.is_dir()) for entry in os.scandir(self.path)]

    def known_entries(self) -> list[Entry]:
        return self.entries()

    def find(self, name: str) -> Entry | None:
        if Path(name).name != name or name in ("", "..") or not models_in([Entry(name, is_folder=True)]):
            return None
        # os.path, because a Path's own question raises for names that no file system takes
        if os.path.isdir(self.path / name):
            return Entry(name, is_folder=True)
        files = [Entry(name + suffix, is_folder=False) for suffix in FORMAT_BY_SUFFIX]
        return next((file for file in files if os.path.isfile(self.path / file.name)), None)

    def bring(self, entry: Entry, name: str) -> Brought:
        return Brought(self.path / entry.name if entry.is_folder else self.path)

    def peek(self, entry: Entry, name: str) -> Brought:
        return self.bring(entry, name)


def open_root(url: str, *, download_directory: str = "", environment: Mapping[str, str] = os.environ) -> Root:
    """Raises InvalidArgument for a URL that can't be one, a broken credential file or a missing extra."""
    if not is_remote(url):
        return LocalRoot(Path(url.removeprefix("file://")))
    address = parse_address(url)
    filesystem = _filesystem(address, environment)
    return RemoteRoot(address, filesystem, SnapshotCache(cache_directory(address, download_directory, environment)))


def cache_directory(address: Address, download_directory: str, environment: Mapping[str, str]) -> Path:
    """--download-directory, else the one that Triton's variable for this cloud names, else the user's cache."""
    if chosen := download_directory or environment.get(_MOUNT_VARIABLES.get(address.kind, "")):
        return Path(chosen)
    user = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/tmp")) / ".cache"
    return Path(user) / "enginehouse" / "repositories"


def _filesystem(address: Address, environment: Mapping[str, str]) -> Any:
    protocol, extra = _PROTOCOLS[address.kind]
    options = filesystem_options(address, _read_credentials(environment), environment)
    try:
        return _filesystem_class(protocol)(skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        raise InvalidArgument(
            f"repository '{address.url}' needs the extra '{extra}': pip install 'enginehouse[{extra}]' ({error})"
        ) from error


def _filesystem_class(protocol: str) -> Any:
    import fsspec

    if protocol == "gs":
        # Not the default class of gcsfs: that asks over gRPC first which kind of bucket it is, and waits a
        # minute where it may not.
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem
    return fsspec.get_filesystem_class(protocol)


def _read_credentials(environment: Mapping[str, str]) -> Mapping[str, Any]:
    path = environment.get(CREDENTIAL_VARIABLE)
    if not path:
        return {}
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"the credential file {path} ({CREDENTIAL_VARIABLE}) can't be read: {error}") from error
    if not isinstance(content, dict):
        raise InvalidArgument(f"the credential file {path} ({CREDENTIAL_VARIABLE}) holds no JSON object")
    return content
