"""A bucket in memory, as fsspec's filesystems look, whose network fails and whose files change when told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass
class Bucket:
    files: dict[str, bytes] = field(default_factory=dict)
    written_s: dict[str, float] = field(default_factory=dict)
    now_s: float = 1_000_000.0
    slept_s: list[float] = field(default_factory=list)
    num_bytes_read: int = 0
    num_listings: int = 0
    before_read: Callable[[str, int], None] = lambda path, start: None
    on_sleep: Callable[[], None] = lambda: None
    _writes: dict[str, int] = field(default_factory=dict)

    def put(self, path: str, content: bytes, age_s: float = 3600.0) -> None:
        self.files[path] = content
        self.written_s[path] = self.now_s - age_s
        self._writes[path] = self._writes.get(path, 0) + 1

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds
        self.on_sleep()

    # --- what fsspec has

    def invalidate_cache(self) -> None:
        """Nothing is cached."""

    def info(self, path: str) -> dict[str, Any]:
        if path not in self.files:
            raise FileNotFoundError(path)
        return {
            "name": path,
            "type": "file",
            "size": len(self.files[path]),
            "ETag": f'"{self._writes[path]}"',
            "LastModified": datetime.fromtimestamp(self.written_s[path], UTC),
        }

    def find(self, prefix: str, detail: bool) -> dict[str, Any]:
        return {path: self.info(path) for path in sorted(self.files) if path.startswith(f"{prefix}/")}

    def ls(self, prefix: str, detail: bool) -> list[dict[str, Any]]:
        self.num_listings += 1
        infos = [self.info(path) for path in self.files if path.rpartition("/")[0] == prefix]
        deeper = {
            path.removeprefix(f"{prefix}/").split("/")[0]
            for path in self.files
            if path.startswith(f"{prefix}/") and "/" in path.removeprefix(f"{prefix}/")
        }
        return infos + [{"name": f"{prefix}/{name}", "type": "directory", "size": 0} for name in sorted(deeper)]

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        self.before_read(path, start)
        chunk = self.files[path][start:end]
        self.num_bytes_read += len(chunk)
        return chunk
