"""The response caches that a server can have: `local`, `redis`, and those of a folder of the user's.

`RemoteCache` is what the ones outside this process share: they may fail and be slow, and then a request is
served as if it were not cached.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from enginehouse.errors import InvalidArgument
from enginehouse.scheduling.response_cache import CacheCounts, CacheEntry, LocalCache, ResponseCache

logger = logging.getLogger("enginehouse.scheduling.caches")

COMPLAINT_INTERVAL_S = 10.0
PAUSE_AFTER_FAILURE_S = 1.0
"""A cache that does not answer costs its timeout once a second, not once a request."""


def make_cache(settings_by_name: Mapping[str, Mapping[str, str]], directory: str = "") -> ResponseCache | None:
    """The cache that --cache-config names, or None without one. Raises InvalidArgument for bad settings."""
    for name, settings in settings_by_name.items():
        if name == "local":
            return LocalCache(_size(settings))
        if name == "redis":
            return RedisCache(settings)
        return _own_cache(name, settings, directory)
    return None


def _size(settings: Mapping[str, str]) -> int:
    size = settings.get("size", "")
    if not size.isdigit():
        raise InvalidArgument(f"--cache-config local,size: expected a number of bytes, got '{size}'")
    return int(size)


def _own_cache(name: str, settings: Mapping[str, str], directory: str) -> ResponseCache:
    """`<directory>/<name>/cache.py` has a function `create(settings)` that gives back a RemoteCache."""
    path = Path(directory) / name / "cache.py"
    spec = importlib.util.spec_from_file_location(f"enginehouse_cache_{name}", path)
    if not directory or spec is None or spec.loader is None or not path.is_file():
        raise InvalidArgument(
            f"unable to find cache '{name}': known are local and redis"
            + (f", and there is no '{path}'" if directory else "; --cache-directory names a folder of others")
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cache: ResponseCache = module.create(settings)
    return cache


class RemoteCache(ABC):
    """A cache that keeps bytes by key somewhere else. Subclasses read and write; failures are misses."""

    def __init__(self) -> None:
        self.counts = CacheCounts()
        self._next_complaint_s = 0.0
        self._paused_until_s = 0.0

    @property
    def num_entries(self) -> int:
        return 0

    @property
    def utilization(self) -> float:
        return 0.0

    @abstractmethod
    async def read(self, key: bytes) -> bytes | None: ...

    @abstractmethod
    async def write(self, key: bytes, value: bytes) -> None: ...

    async def close(self) -> None:  # noqa: B027  # most have nothing to give back
        """Gives connections back."""

    async def get(self, key: bytes) -> CacheEntry | None:
        if self._is_paused():
            return None
        try:
            value = await self.read(key)
            return CacheEntry.decode(value) if value is not None else None
        except msgspec.MsgspecError as error:
            self._complain("holds an entry that can't be read", error)
        except Exception as error:  # whatever the library of the cache raises
            self._pause("can't be read", error)
        return None

    async def put(self, key: bytes, entry: CacheEntry) -> None:
        if self._is_paused():
            return
        try:
            await self.write(key, entry.encode())
        except Exception as error:  # whatever the library of the cache raises
            self._pause("can't be written", error)

    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until_s

    def _pause(self, what: str, error: Exception) -> None:
        self._paused_until_s = time.monotonic() + PAUSE_AFTER_FAILURE_S
        self._complain(what, error)

    def _complain(self, what: str, error: Exception) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_complaint_s:
            self._next_complaint_s = now_s + COMPLAINT_INTERVAL_S
            logger.error("response cache %s: %s: %s", what, type(error).__name__, error)


class RedisCache(RemoteCache):
    """Shared by all servers that use the same Redis.

    Settings by Triton's names: host, port, user, password, db, wait_timeout (ms), tls_enabled, cert, key,
    cacert; and ttl (seconds). User and password also come from TRITONCACHE_REDIS_USERNAME and _PASSWORD.
    """

    PREFIX = b"enginehouse:"

    def __init__(self, settings: Mapping[str, str]) -> None:
        super().__init__()
        try:
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError as error:
            raise InvalidArgument(
                "--cache-config redis needs the package redis: pip install 'enginehouse[redis]'"
            ) from error
        if "host" not in settings or not settings.get("port", "6379").isdigit():
            raise InvalidArgument("--cache-config redis: must have host=<name> and port=<number>")
        timeout_s = int(settings.get("wait_timeout", "1000")) / 1000
        tls: dict[str, Any] = {}
        if settings.get("tls_enabled", "false").lower() == "true":
            tls = {
                "ssl": True,
                "ssl_certfile": settings.get("cert"),
                "ssl_keyfile": settings.get("key"),
                "ssl_ca_certs": settings.get("cacert"),
            }
        self._ttl_s = int(settings.get("ttl", "0")) or None
        self._redis: Any = Redis(
            host=settings["host"],
            port=int(settings.get("port", "6379")),
            username=settings.get("user", os.environ.get("TRITONCACHE_REDIS_USERNAME")),
            password=settings.get("password", os.environ.get("TRITONCACHE_REDIS_PASSWORD")),
            db=int(settings.get("db", "0")),
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),  # once more on a connection that Redis had closed
            **tls,
        )

    async def read(self, key: bytes) -> bytes | None:
        value: bytes | None = await self._redis.get(self.PREFIX + key)
        return value

    async def write(self, key: bytes, value: bytes) -> None:
        await self._redis.set(self.PREFIX + key, value, ex=self._ttl_s)

    async def close(self) -> None:
        await self._redis.aclose()
