"""The comments of protos/model_config.proto, by message and field: what references and editors show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

# Numbers of fields of descriptor.proto, which paths of comments are made of.
_FILE_MESSAGES, _MESSAGE_FIELDS, _NESTED_MESSAGES = 4, 2, 3


@cache
def comments() -> dict[str, str]:
    """By `ModelInput` and `ModelInput.dims`, in one line each."""
    content = Path(__file__).with_name("schema.binpb").read_bytes()
    file = FileDescriptorSet.FromString(content).file[0]
    texts = _texts(file)
    named = (
        entry
        for index, message in enumerate(file.message_type)
        for entry in _paths(message, message.name, (_FILE_MESSAGES, index))
    )
    return {name: texts[path] for name, path in named if path in texts}


def _texts(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {
        tuple(location.path): " ".join(location.leading_comments.split())
        for location in file.source_code_info.location
        if location.leading_comments
    }


def _paths(
    message: DescriptorProto, name: str, path: Sequence[int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name, tuple(path)
    for index, field in enumerate(message.field):
        yield f"{name}.{field.name}", (*path, _MESSAGE_FIELDS, index)
    for index, nested in enumerate(message.nested_type):
        yield from _paths(nested, f"{name}.{nested.name}", (*path, _NESTED_MESSAGES, index))
