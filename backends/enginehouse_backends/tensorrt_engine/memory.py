"""Device memory, copies, streams and graphs for TensorRT, by way of torch. Everything is bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from enginehouse.types import DeviceData

ALIGNMENT = 256
"""TensorRT wants its tensors to start at multiples of this."""


class Memory(Protocol):
    """One instance's. Copies and kernels are queued on one stream; results are there after `synchronize`."""

    device: str
    stream_handle: int

    def allocate(self, num_bytes: int) -> Any:
        """Bytes on the device, with `data_ptr()`. At least one, so that there is an address."""
        ...

    def upload(self, name: str, target: Any, source: memoryview) -> None: ...
    def download(self, source: Any, num_bytes: int) -> memoryview:
        """May be read after `synchronize`."""
        ...

    def synchronize(self) -> None: ...
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records what `work` queues; the result queues it again."""
        ...

    def use(self) -> Any:
        """A context manager: the device and stream are this thread's while it lasts."""
        ...


class CudaMemory:
    def __init__(
        self, device: str, priority: int, *, pins_inputs: bool, pins_outputs: bool, busy_wait: bool, copies_apart: bool
    ) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
        copies = torch.cuda.Stream(device, priority=priority) if copies_apart else None  # type: ignore[no-untyped-call]
        self._copy_stream = copies or self._stream
        self._done = torch.cuda.Event(blocking=not busy_wait)  # type: ignore[no-untyped-call]
        self._pins_inputs = pins_inputs
        self._pins_outputs = pins_outputs
        self._staging: dict[str, Any] = {}
        self.stream_handle: int = self._stream.cuda_stream

    def use(self) -> Any:
        return torch.cuda.stream(self._stream)

    def allocate(self, num_bytes: int) -> Any:
        return torch.empty(max(num_bytes, 1), dtype=torch.uint8, device=self.device)

    def upload(self, name: str, target: Any, source: memoryview) -> None:
        if not source.nbytes:
            return
        data = torch.frombuffer(bytearray(source) if source.readonly else source, dtype=torch.uint8)
        if self._pins_inputs:
            data = self._stage(name, data)
        target[: len(data)].copy_(data, non_blocking=True)

    def _stage(self, name: str, data: Any) -> Any:
        """A copy in pinned memory, from where the GPU fetches by itself. Free again once the batch is done."""
        held = self._staging.get(name)
        if held is None or len(held) < len(data):
            held = self._staging[name] = torch.empty(len(data), dtype=torch.uint8, pin_memory=True)
        return held[: len(data)].copy_(data)

    def download(self, source: Any, num_bytes: int) -> memoryview:
        target = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pins_outputs)
        if self._copy_stream is not self._stream:
            self._copy_stream.wait_stream(self._stream)
        with torch.cuda.stream(self._copy_stream):
            target.copy_(source[:num_bytes], non_blocking=True)
        return memoryview(target.numpy().data)

    def synchronize(self) -> None:
        self._done.record(self._copy_stream)
        self._done.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            work()
        return graph.replay


def address_on(device: str, data: memoryview | DeviceData) -> int | None:
    """Where the tensor lies, if it is on that device already and TensorRT can read it there."""
    pointer = getattr(data, "pointer", None)
    if not isinstance(data, DeviceData) or data.device != device or pointer is None or pointer % ALIGNMENT:
        return None
    return int(pointer)
