"""The JSON before binary tensors is mostly the same in request after request: what it meant when it was read.

Kept are only texts that say nothing but which binary tensors come and which outputs go: no id, no parameters of the
request, no shared memory. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from enginehouse.frontends.output_options import OutputOption, OutputOptions
from enginehouse.types import DataType, InferRequest, Tensor

MAX_TEXT_BYTES = 2048
_MAX_KNOWN = 1024


@dataclass(frozen=True, slots=True)
class KnownHead:
    inputs: Sequence[tuple[str, DataType, tuple[int, ...], int]]
    """Name, type, shape and number of bytes, in the order of the bytes."""
    num_bytes: int
    requested_outputs: Sequence[str]
    options: dict[str, OutputOption]
    """Shared by all requests that say the same."""

    def fill(self, request: InferRequest, options: OutputOptions, tail: memoryview) -> None:
        """`tail` has `num_bytes`."""
        start = 0
        for name, datatype, shape, num_bytes in self.inputs:
            end = start + num_bytes
            request.inputs[name] = Tensor(name, datatype, shape, tail[start:end])
            start = end
        request.requested_outputs = self.requested_outputs
        options.by_name = self.options


_known: dict[bytes, KnownHead] = {}


def known_head(text: bytes, num_tail_bytes: int) -> KnownHead | None:
    """If a request of the same text was good, and this one has as many bytes behind it."""
    found = _known.get(text)
    return found if found is not None and found.num_bytes == num_tail_bytes else None


def remember_head(text: bytes, document: Any, request: InferRequest, options: OutputOptions) -> None:
    """After the text was read into request and options, all of it without a complaint."""
    if options.leases or not document.keys() <= {"inputs", "outputs"}:
        return
    if any("data" in entry for entry in document["inputs"]):
        return
    inputs = [(tensor.name, tensor.datatype, tensor.shape, tensor.nbytes) for tensor in request.inputs.values()]
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    num_bytes = sum(entry[3] for entry in inputs)
    _known[text] = KnownHead(inputs, num_bytes, request.requested_outputs, options.by_name)
