"""A checkpoint's tensors by name: memory maps of its safetensors files, checked before anything is read.

Every way in which a download or a copy goes wrong has its own error with file and numbers: no weights,
a shard that is missing, a file cut short, a tensor that is missing or has another shape.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from enginehouse.errors import InvalidArgument, NotFound, Unsupported

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `start` and `stop` are offsets in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """Tensors by name, as views of mapped files. `close` unmaps them: no view may be in use then."""

    def __init__(self, folder: Path) -> None:
        """Raises NotFound or InvalidArgument naming the file that is missing or broken."""
        self.folder = folder
        self._tensors: dict[str, StoredTensor] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for path in _weight_files(folder):
            self._tensors.update({_text_name(name): stored for name, stored in _read_header(path).items()})
        if "embed_tokens.weight" in self._tensors:  # saved without its head: the decoder alone
            self._tensors = {f"model.{name}": stored for name, stored in self._tensors.items()}
        self._check_index()

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def num_bytes(self) -> int:
        return sum(stored.stop - stored.start for stored in self._tensors.values())

    def stored(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise InvalidArgument(f"{self.folder}: the checkpoint has no tensor '{name}'")
        return self._tensors[name]

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """A read-only view of the file. Raises InvalidArgument if it is missing or has another shape."""
        stored = self.stored(name)
        if shape is not None and stored.shape != shape:
            raise InvalidArgument(
                f"{stored.file}: tensor '{name}' has shape {list(stored.shape)}, config.json asks for {list(shape)}"
            )
        if stored.start == stored.stop:
            return torch.empty(stored.shape, dtype=stored.dtype)
        view = memoryview(self._map(stored.file))[stored.start : stored.stop]
        return torch.frombuffer(view, dtype=stored.dtype).reshape(stored.shape)

    def release(self, name: str) -> None:
        """Gives the tensor's file pages back to the system; reading it again reads the file again."""
        stored = self.stored(name)
        start = -(-stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = stored.stop // mmap.PAGESIZE * mmap.PAGESIZE - start
        if stored.file in self._maps and length > 0:
            self._maps[stored.file].madvise(mmap.MADV_DONTNEED, start, length)

    def close(self) -> None:
        for mapped in self._maps.values():
            try:
                mapped.close()
            except BufferError:
                pass  # a view is still alive (an error's traceback holds it): the map goes with the view
        self._maps.clear()

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                # private and writable: torch warns of read-only buffers, and nothing writes here
                self._maps[path] = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        return self._maps[path]

    def _check_index(self) -> None:
        index = _read_index(self.folder)
        for name, file in index.items():
            if not {_text_name(name), f"model.{name}"} & self._tensors.keys():
                raise InvalidArgument(f"{self.folder / file} lacks the tensor '{name}' that the index promises")


def _text_name(name: str) -> str:
    """The name as in a text-only checkpoint: multimodal ones put their decoder under `language_model`."""
    for wrapped, plain in (("language_model.model.", "model."), ("model.language_model.", "model.")):
        if name.startswith(wrapped):
            return plain + name.removeprefix(wrapped)
    return name.removeprefix("language_model.")


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return {}
    try:
        names: dict[str, str] = dict(json.loads(path.read_text("utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(f"{path} is no checkpoint index: {error!r}") from error
    return names


def _weight_files(folder: Path) -> list[Path]:
    index = _read_index(folder)
    if index:
        files = sorted(set(index.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise NotFound(
                f"{folder}: {len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:5])}"
            )
        return [folder / name for name in files]
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        if any(folder.glob("*.bin")):
            raise Unsupported(f"{folder} has only .bin weights; save the model as safetensors")
        raise NotFound(f"{folder} has no weights: no *.safetensors file")
    return paths


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InvalidArgument(f"{path} is cut short or no safetensors file: {size} bytes, header needs {length}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InvalidArgument(f"{path} has a broken safetensors header: {error}") from error
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _stored(path: Path, name: str, entry: dict[str, Any], base: int, size: int) -> StoredTensor:
    try:
        start, stop = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{path}: tensor '{name}' has a broken header entry: {error!r}") from error
    if base + stop > size:
        raise InvalidArgument(
            f"{path} is cut short: tensor '{name}' ends at byte {base + stop}, the file has {size} bytes"
        )
    expected = dtype.itemsize
    for dim in shape:
        expected *= dim
    if stop - start != expected:
        raise InvalidArgument(f"{path}: tensor '{name}' has {stop - start} bytes, its shape needs {expected}")
    return StoredTensor(path, dtype, shape, base + start, base + stop)
