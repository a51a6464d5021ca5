"""What an ONNX file says of its inputs, outputs and weights, read in milliseconds whatever the file's size.

A reader of the few protobuf fields that matter (onnx.proto3: ModelProto → GraphProto → ValueInfoProto). The
file is mapped and weights are stepped over, so a repository of a thousand models is understood without
loading any of them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from enginehouse.errors import InvalidArgument

# field numbers
MODEL_GRAPH = 7
GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_SPARSE_INITIALIZER = 5, 11, 12, 15
TENSOR_NAME, TENSOR_EXTERNAL_DATA = 8, 13
ENTRY_KEY, ENTRY_VALUE = 1, 2
VALUE_NAME, VALUE_TYPE = 1, 2
TYPE_TENSOR = 1
KIND_BY_TYPE_FIELD = {4: "sequence", 5: "map", 8: "sparse tensor", 9: "optional"}
TENSOR_ELEMENT_TYPE, TENSOR_SHAPE = 1, 2
SHAPE_DIM = 1
DIM_VALUE, DIM_PARAM = 1, 2

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """An input or output. `dims` is None where the file gives no shape; a free one is its name or ""."""

    name: str
    element_type: int
    """onnx.TensorProto.DataType; 0 for what is no tensor."""
    dims: tuple[int | str, ...] | None
    kind: str = "tensor"


@dataclass(frozen=True, slots=True)
class OnnxFile:
    inputs: tuple[OnnxValue, ...]
    """Without those that are initializers: ONNX Runtime doesn't ask for them."""
    defaulted_inputs: tuple[OnnxValue, ...]
    """Inputs that may be left out, because an initializer of that name stands in."""
    outputs: tuple[OnnxValue, ...]
    external_files: tuple[str, ...]
    """Where weights are kept beside the file, relative to its folder."""


def read_onnx_file(path: Path) -> OnnxFile:
    """Raises InvalidArgument, naming the file, if it is no ONNX model."""
    if path.stat().st_size == 0:
        raise InvalidArgument(f"{path} is empty, not an ONNX model")
    with path.open("rb") as file:
        # never closed by hand: an error's traceback may still hold views of it; it goes with the last of them
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _read_model(memoryview(content))
    except (IndexError, ValueError, UnicodeDecodeError) as problem:
        raise InvalidArgument(f"{path} is not an ONNX model: {problem}") from None


def _read_model(model: memoryview) -> OnnxFile:
    inputs: list[OnnxValue] = []
    outputs: list[OnnxValue] = []
    initializers: set[str] = set()
    external_files: dict[str, None] = {}
    found_graph = False
    for number, graph in _messages(model):
        if number != MODEL_GRAPH:
            continue
        found_graph = True
        for field, content in _messages(graph):
            if field == GRAPH_INPUT:
                inputs.append(_read_value(content))
            elif field == GRAPH_OUTPUT:
                outputs.append(_read_value(content))
            elif field == GRAPH_INITIALIZER:
                name, location = _read_initializer(content)
                initializers.add(name)
                if location:
                    external_files[location] = None
    if not found_graph or not outputs:
        raise ValueError("it has no graph with outputs")
    return OnnxFile(
        tuple(value for value in inputs if value.name not in initializers),
        tuple(value for value in inputs if value.name in initializers),
        tuple(outputs),
        tuple(external_files),
    )


def _read_initializer(tensor: memoryview) -> tuple[str, str]:
    """Its name, and the file that holds its data or ""."""
    name = location = ""
    for number, content in _messages(tensor):
        if number == TENSOR_NAME:
            name = str(content, "utf-8")
        elif number == TENSOR_EXTERNAL_DATA:
            entry = {field: str(text, "utf-8") for field, text in _messages(content)}
            if entry.get(ENTRY_KEY) == "location":
                location = entry.get(ENTRY_VALUE, "")
    return name, location


def _read_value(value: memoryview) -> OnnxValue:
    name, kind, element_type = "", "tensor", 0
    dims: tuple[int | str, ...] | None = None
    for number, content in _messages(value):
        if number == VALUE_NAME:
            name = str(content, "utf-8")
        elif number == VALUE_TYPE:
            for field, inner in _messages(content):
                if field == TYPE_TENSOR:
                    element_type, dims = _read_tensor_type(inner)
                elif field in KIND_BY_TYPE_FIELD:
                    kind = KIND_BY_TYPE_FIELD[field]
    return OnnxValue(name, element_type, dims, kind)


def _read_tensor_type(tensor_type: memoryview) -> tuple[int, tuple[int | str, ...] | None]:
    element_type = 0
    dims: tuple[int | str, ...] | None = None
    for number, content in _fields(tensor_type):
        if number == TENSOR_ELEMENT_TYPE and isinstance(content, int):
            element_type = content
        elif number == TENSOR_SHAPE and isinstance(content, memoryview):
            dims = tuple(_read_dim(dim) for field, dim in _messages(content) if field == SHAPE_DIM)
    return element_type, dims


def _read_dim(dim: memoryview) -> int | str:
    """Its size, or its name, or "" for one that is free and has no name."""
    for number, content in _fields(dim):
        if number == DIM_VALUE and isinstance(content, int) and content < 1 << 63:
            return content
        if number == DIM_PARAM and isinstance(content, memoryview):
            return str(content, "utf-8")
    return ""


def _messages(buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields that have a length: strings, bytes and messages."""
    for number, content in _fields(buffer):
        if isinstance(content, memoryview):
            yield number, content


def _fields(buffer: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Field numbers and contents of one message. Raises IndexError or ValueError where it isn't one."""
    position, end = 0, len(buffer)
    while position < end:
        tag, position = _varint(buffer, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, position = _varint(buffer, position)
            yield number, value
        elif wire_type == LENGTH_DELIMITED:
            length, position = _varint(buffer, position)
            if position + length > end:
                raise ValueError("it ends in the middle of a field")
            yield number, buffer[position : position + length]
            position += length
        elif wire_type in (FIXED64, FIXED32):
            position += 8 if wire_type == FIXED64 else 4
        else:
            raise ValueError(f"byte {position} can't be a field")


def _varint(buffer: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number has too many bytes")
