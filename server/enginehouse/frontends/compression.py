"""gzip and deflate of HTTP bodies: which one is meant, and packing and unpacking within a limit. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from enginehouse.errors import InvalidArgument
from enginehouse.frontends.http_message import Buffer

SUPPORTED = ("gzip", "deflate")
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_EITHER = 32 + zlib.MAX_WBITS
_LEVEL = 1
"""Speed first: tensors compress badly, and JSON well at any level."""


def accepted_encoding(header: str | None) -> str | None:
    """The encoding of the answer: the supported one with the highest q, the first of equals."""
    if not header:
        return None
    best, best_quality = None, 0.0
    for part in header.split(","):
        name, _, parameters = part.strip().partition(";")
        name = name.strip().lower()
        if name in SUPPORTED:
            quality = _quality(parameters)
            if quality > best_quality:
                best, best_quality = name, quality
    return best


def _quality(parameters: str) -> float:
    key, _, value = parameters.strip().partition("=")
    if key.strip() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0


def compress(body: Sequence[Buffer], encoding: str) -> bytes:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return b"".join((*(packer.compress(part) for part in body), packer.flush()))


def decompress(body: Buffer, encoding: str, max_bytes: int) -> bytes:
    """Which of the two it is, the body itself says. Raises InvalidArgument for what is neither or is larger than
    `max_bytes` unpacked."""
    unpacker = zlib.decompressobj(_EITHER)
    try:
        data = unpacker.decompress(body, max_bytes + 1)
        if len(data) > max_bytes:
            raise too_large(len(data), max_bytes, "decompressed request size of at least")
        data += unpacker.flush()
    except zlib.error as error:
        raise InvalidArgument(f"failed to decompress the {encoding} request body: {error}") from None
    if not unpacker.eof:
        raise InvalidArgument(f"failed to decompress the {encoding} request body: it ends too early")
    return data


def too_large(num_bytes: int, max_bytes: int, what: str) -> InvalidArgument:
    return InvalidArgument(
        f"{what} {num_bytes} bytes exceeds the maximum allowed input size of {max_bytes} bytes. Use "
        "--http-max-input-size to increase the limit."
    )
