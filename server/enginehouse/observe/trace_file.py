"""Traces as JSON files: FILE holds one array, or FILE.0, FILE.1 … one each, as Triton's tools read them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Entry = dict[str, Any]


class TraceFile:
    """Where the traces of one or more settings go. Can't-write is logged: tracing never fails a request."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._index = 0
        self._is_open = False

    def append(self, entries: Sequence[Entry]) -> None:
        """To the one array in FILE, which `close` ends."""
        body = ",".join(_compact(entry) for entry in entries)
        try:
            with self._path.open("a" if self._is_open else "w") as file:
                file.write(("," if self._is_open else "[") + body)
            self._is_open = True
        except OSError as error:
            logger.error("failed creating trace file: %s", error)

    def write_indexed(self, entries: Sequence[Entry]) -> None:
        """A file of its own, with the next number."""
        path = self._path.with_name(f"{self._path.name}.{self._index}")
        self._index += 1
        try:
            path.write_text("[" + ",".join(_compact(entry) for entry in entries) + "]")
        except OSError as error:
            logger.error("failed creating trace file: %s", error)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            with self._path.open("a") as file:
                file.write("]")


def _compact(entry: Entry) -> str:
    return json.dumps(entry, separators=(",", ":"))
