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

    def upload(self, name: str, target: Any, source: memoryview | DeviceData) -> None:
        """The source may be on this device already."""
        ...

    def keep(self, source: Any, num_bytes: int) -> DeviceData:
        """A copy on the device that outlives the next batch. May be read after `synchronize`."""
        ...

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

    def upload(self, name: str, target: Any, source: memoryview | DeviceData) -> None:
        if not source.nbytes:
            return
        if isinstance(source, DeviceData):
            target[: source.nbytes].copy_(torch.as_tensor(DeviceBytes(source), device=self.device), non_blocking=True)
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

    def keep(self, source: Any, num_bytes: int) -> DeviceData:
        return KeptBytes(source[:num_bytes].clone(), self.device)

    def synchronize(self) -> None:
        self._done.record(self._copy_stream)
        self._done.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            work()
        return graph.replay


class KeptBytes(DeviceData):
    """An output that stayed on the device."""

    def __init__(self, data: Any, device: str) -> None:
        self.data = data
        self.nbytes = len(data)
        self.device = device
        self.pointer = data.data_ptr()

    def to_host(self) -> memoryview:
        return memoryview(self.data.cpu().numpy().data)


class DeviceBytes:
    """Another model's memory on the device, as bytes for torch to view."""

    def __init__(self, data: DeviceData) -> None:
        self.data = data
        self.__cuda_array_interface__ = {
            "data": (data.pointer, False),  # type: ignore[attr-defined]  # checked by `here_or_host`
            "shape": (data.nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


def here_or_host(device: str, data: memoryview | DeviceData) -> memoryview | DeviceData:
    """The data itself if it can be read on that device, else its bytes in host memory."""
    if isinstance(data, memoryview):
        return data
    return data if data.device == device and hasattr(data, "pointer") else data.to_host()


def address_on(device: str, data: memoryview | DeviceData) -> int | None:
    """Where the tensor lies, if it is on that device already and TensorRT can read it there."""
    pointer = getattr(data, "pointer", None)
    if not isinstance(data, DeviceData) or data.device != device or pointer is None or pointer % ALIGNMENT:
        return None
    return int(pointer)
