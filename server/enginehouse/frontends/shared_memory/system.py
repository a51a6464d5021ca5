"""POSIX shared memory of clients: opening, viewing and writing it."""

from __future__ import annotations

import mmap
import os
from typing import Any

from enginehouse.errors import Internal, InvalidArgument
from enginehouse.frontends.shared_memory.regions import MAX_UINT64, RESERVED_PREFIX, Region, RegionKind

_DIRECTORY = "/dev/shm/"


class SystemMemory:
    """A mapping of `num_bytes` from `offset` on. Views stay valid after close: they hold the mapping."""

    def __init__(self, name: str, key: str, offset: int, num_bytes: int) -> None:
        self._map = _map(name, key, offset, num_bytes)
        # mmap wants page-aligned offsets, clients may ask for any.
        self._skip = offset % mmap.ALLOCATIONGRANULARITY
        self._view = memoryview(self._map)[self._skip : self._skip + num_bytes]

    def view(self, offset: int, num_bytes: int) -> memoryview:
        return self._view[offset : offset + num_bytes].toreadonly()

    def write(self, offset: int, data: memoryview) -> None:
        self._view[offset : offset + data.nbytes] = data

    def close(self) -> None:
        """The mapping goes with its last view: a model may still be reading one."""
        self._view.release()


def _map(name: str, key: str, offset: int, num_bytes: int) -> mmap.mmap:
    try:
        descriptor = os.open(_path_of(key), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, ValueError):
        raise Internal(f"Unable to open shared memory region: '{key}'") from None
    try:
        if num_bytes == 0 and offset <= os.fstat(descriptor).st_size:
            raise InvalidArgument(
                f"failed to register shared memory region '{name}': unable to process address spaceInvalid argument"
            )
        if offset + num_bytes > os.fstat(descriptor).st_size:
            raise InvalidArgument(f"failed to register shared memory region '{name}': invalid args")
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        return mmap.mmap(descriptor, offset + num_bytes - start, offset=start)
    except (OSError, ValueError, OverflowError) as error:
        raise Internal(f"unable to mmap shared memory region '{key}': {error}") from None
    finally:
        os.close(descriptor)


def _path_of(key: str) -> str:
    """As shm_open: one name with at most a leading slash."""
    name = key.removeprefix("/")
    if not name or "/" in name or name in (".", "..") or "\0" in name:
        raise ValueError(key)
    return _DIRECTORY + name


def open_region(name: str, key: str, offset: int, num_bytes: int) -> Region:
    """Raises Internal if there is no such object, InvalidArgument for a key that is not the client's to
    name and if the object is smaller than asked for."""
    if key.removeprefix("/").startswith(RESERVED_PREFIX):
        raise InvalidArgument(
            f"cannot register shared memory region '{name}' with key '{key}' as the key contains the reserved "
            f"prefix '{RESERVED_PREFIX}'"
        )
    if offset + num_bytes > MAX_UINT64:
        raise InvalidArgument(f"Integer overflow detected: byte_size ({num_bytes}) + offset ({offset})")
    memory: Any = SystemMemory(name, key, offset, num_bytes)
    return Region(name, RegionKind.SYSTEM, memory, num_bytes, key=key, offset=offset)
