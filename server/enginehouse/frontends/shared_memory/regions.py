"""Which shared memory regions clients have registered, and who is using them.

A region that is in use when it is unregistered stays, visible in the status, until its last lease ends.
Names are one space for both kinds; opening memory is `system.py`'s and `cuda.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from enginehouse.errors import AlreadyExists, InvalidArgument, NotFound, Unsupported
from enginehouse.types import DeviceData

MAX_UINT64 = 2**64 - 1
RESERVED_PREFIX = "triton_python_backend_shm_region_"


class RegionKind(StrEnum):
    SYSTEM = "system"
    CUDA = "cuda"


class Memory(Protocol):
    """An opened piece of memory."""

    def view(self, offset: int, num_bytes: int) -> memoryview | DeviceData: ...
    def write(self, offset: int, data: memoryview) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Region:
    """`key` and `offset` are of system regions, `device_id` of cuda ones."""

    name: str
    kind: RegionKind
    memory: Memory
    num_bytes: int
    key: str = ""
    offset: int = 0
    device_id: int = 0
    num_leases: int = 0
    leaving: bool = False


@dataclass(slots=True)
class Lease:
    """A range of a region in use by one request."""

    region: Region
    offset: int
    num_bytes: int
    on_release: Callable[[Region], None]
    released: bool = False

    def view(self) -> memoryview | DeviceData:
        return self.region.memory.view(self.offset, self.num_bytes)

    def write(self, data: memoryview) -> None:
        self.region.memory.write(self.offset, data)

    def release(self) -> None:
        if not self.released:
            self.released = True
            self.on_release(self.region)


Open = Callable[[], Memory]


@dataclass(slots=True)
class Regions:
    """`allowed` is --allow-client-shm: without it everything here is refused."""

    allowed: bool = True
    by_name: dict[str, Region] = field(default_factory=dict)

    def register(self, region_of: Callable[[], Region], name: str, kind: RegionKind) -> None:
        """`region_of` opens the memory; it is called after the name was found free."""
        self.refuse_if_disabled()
        if name.startswith(RESERVED_PREFIX):
            raise InvalidArgument(
                f"cannot register shared memory region '{name}': the prefix '{RESERVED_PREFIX}' is reserved"
            )
        if name in self.by_name:
            raise AlreadyExists(f"shared memory region '{name}' already in manager")
        self.by_name[name] = region_of()

    def status(self, kind: RegionKind, name: str = "") -> list[Region]:
        """One region or all of a kind. Raises NotFound for a name that is none."""
        self.refuse_if_disabled()
        if not name:
            return [region for region in self.by_name.values() if region.kind is kind]
        region = self.by_name.get(name)
        if region is None:
            raise NotFound(f"Unable to find {kind} shared memory region: '{name}'")
        if region.kind is not kind:
            other = RegionKind.CUDA if kind is RegionKind.SYSTEM else RegionKind.SYSTEM
            raise NotFound(
                f"The region named '{name}' is registered as {other} shared memory, not {kind} shared memory"
            )
        return [region]

    def unregister(self, kind: RegionKind, name: str = "") -> None:
        """Of one region, or without a name of all of the kind. Unknown names are ignored."""
        self.refuse_if_disabled()
        if not name:
            for region in [region for region in self.by_name.values() if region.kind is kind]:
                self._leave(region)
            return
        region_or_none = self.by_name.get(name)
        if region_or_none is not None and region_or_none.kind is kind:
            self._leave(region_or_none)

    def lease(self, name: str, offset: int, num_bytes: int) -> Lease:
        """The range, held until released. Raises NotFound, and InvalidArgument for a range outside."""
        self.refuse_if_disabled()
        region = self.by_name.get(name)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        if offset + num_bytes > MAX_UINT64:
            raise InvalidArgument(f"Integer overflow detected: byte_size ({num_bytes}) + offset ({offset})")
        if offset >= region.num_bytes:
            raise InvalidArgument(f"Invalid offset for shared memory region: '{name}'")
        if not 0 < offset + num_bytes <= region.num_bytes:
            raise InvalidArgument(f"Invalid offset + byte size for shared memory region: '{name}'")
        region.num_leases += 1
        return Lease(region, offset, num_bytes, self._returned)

    def close(self) -> None:
        for region in list(self.by_name.values()):
            region.memory.close()
        self.by_name.clear()

    def refuse_if_disabled(self) -> None:
        if not self.allowed:
            raise Unsupported(
                "Client shared memory is disabled. Start the server with --allow-client-shm=true to enable it."
            )

    def _leave(self, region: Region) -> None:
        region.leaving = True
        if region.num_leases == 0:
            self._remove(region)

    def _returned(self, region: Region) -> None:
        region.num_leases -= 1
        if region.leaving and region.num_leases == 0:
            self._remove(region)

    def _remove(self, region: Region) -> None:
        self.by_name.pop(region.name, None)
        region.memory.close()
