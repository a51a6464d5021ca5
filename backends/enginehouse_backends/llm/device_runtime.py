"""What a runner needs of a device besides tensors: one stream in order, events, captured graphs, pinned memory.

`CudaRuntime` is torch.cuda; `SimulatedRuntime` runs on the CPU and does everything as late as it may: work waits
in its stream until somebody waits for an event, so a buffer that is overwritten too early shows as a wrong result.
"""

from __future__ import annotations

import gc
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from enginehouse.errors import ResourceExhausted, Unsupported

Work = Callable[[], None]


class Event(ABC):
    """A point in the stream."""

    @abstractmethod
    def wait(self) -> None:
        """Blocks until everything that was launched before it is done."""


class Graph(ABC):
    """Work that was captured once; `replay` is itself work for the stream."""

    @abstractmethod
    def replay(self) -> None: ...


class DeviceRuntime(ABC):
    """One stream of one device. Everything that touches device memory goes through `launch`."""

    device: torch.device
    num_multiprocessors: int

    @abstractmethod
    def launch(self, work: Work) -> None:
        """`work` only enqueues: it must not wait for the device. Runs after what was launched before."""

    @abstractmethod
    def record(self) -> Event: ...

    @abstractmethod
    def capture(self, work: Work) -> Graph:
        """Runs `work` for warming up, then captures it. It must use the same memory each time."""

    @abstractmethod
    def seconds(self, work: Callable[[], object], times: int = 20) -> float:
        """How long `work` takes on the device, on average. Waits for it: never in a step."""

    @abstractmethod
    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Host memory [num_bytes] uint8 from which copies to the device don't block."""

    @abstractmethod
    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory [num_bytes] uint8 of the device, all zeros. Raises ResourceExhausted with the numbers."""

    @abstractmethod
    def release(self) -> None:
        """Waits until nothing runs, and gives memory that no tensor uses any more back to the device."""

    @abstractmethod
    def synchronize(self) -> None:
        """Blocks until the whole device is idle. Never in a step."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Of the device's memory."""


class CudaRuntime(DeviceRuntime):
    """See module."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.set_device(device)
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device)
        self._pool: Any = None
        """All graphs share one memory pool: only one of them runs at a time."""
        self.num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def launch(self, work: Work) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> Event:
        return _CudaEvent(self._stream)

    def capture(self, work: Work) -> Graph:
        for _ in range(2):  # kernels are compiled and libraries make their handles outside of the capture
            self.launch(work)
        self._stream.synchronize()
        graph: Any = torch.cuda.CUDAGraph()
        # other threads may load a model meanwhile, and NCCL's looks at its events
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        self._pool = self._pool or graph.pool()
        return _CudaGraph(graph)

    def seconds(self, work: Callable[[], object], times: int = 20) -> float:
        cuda: Any = torch.cuda
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            work()
            begin.record(self._stream)
            for _ in range(times):
                work()
            end.record(self._stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / times

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        try:
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise ResourceExhausted(
                f"{num_bytes / (1 << 30):.2f} GiB of KV memory are not to be had on {self.device}, "
                f"{self.free_bytes() / (1 << 30):.2f} GiB are free"
            ) from error

    def release(self) -> None:
        self.synchronize()
        gc.collect()
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])


class _CudaEvent(Event):
    def __init__(self, stream: torch.cuda.Stream) -> None:
        # blocking: the thread sleeps meanwhile, as others share the processor
        cuda: Any = torch.cuda
        self._event = cuda.Event(blocking=True)
        self._event.record(stream)

    def wait(self) -> None:
        self._event.synchronize()


class _CudaGraph(Graph):
    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


class SimulatedRuntime(DeviceRuntime):
    """See module. Counts what a real device would be asked for."""

    def __init__(self, num_multiprocessors: int = 4, memory_bytes: int = 1 << 30) -> None:
        self.device = torch.device("cpu")
        self.num_multiprocessors = num_multiprocessors
        self.num_waits = self.num_replays = self.num_captures = 0
        self._memory_bytes = memory_bytes
        self._stream: deque[Work] = deque()
        self._launched = self._done = 0
        self._running = False

    def launch(self, work: Work) -> None:
        assert not self._running, "bug: work that runs on the device launches more"
        self._stream.append(work)
        self._launched += 1

    def record(self) -> Event:
        return _SimulatedEvent(self, self._launched)

    def capture(self, work: Work) -> Graph:
        self.num_captures += 1
        return _SimulatedGraph(self, work)

    def seconds(self, work: Callable[[], object], times: int = 20) -> float:
        """Once: the interpreter's time says nothing of a device's."""
        started_s = time.perf_counter()
        work()
        return time.perf_counter() - started_s

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        if num_bytes > self._memory_bytes:
            raise ResourceExhausted(f"a simulated GPU of {self._memory_bytes} bytes was asked for {num_bytes}")
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def release(self) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        self.run_until(self._launched)

    def free_bytes(self) -> int:
        return self._memory_bytes

    def run_until(self, position: int) -> None:
        assert not self._running, "bug: work that runs on the device waits for it"
        while self._done < position:
            work = self._stream.popleft()
            self._running = True
            try:
                work()
            finally:
                self._running = False
                self._done += 1


class _SimulatedEvent(Event):
    def __init__(self, runtime: SimulatedRuntime, position: int) -> None:
        self._runtime, self._position = runtime, position

    def wait(self) -> None:
        self._runtime.num_waits += 1
        self._runtime.run_until(self._position)


class _SimulatedGraph(Graph):
    def __init__(self, runtime: SimulatedRuntime, work: Work) -> None:
        self._runtime, self._work = runtime, work

    def replay(self) -> None:
        self._runtime.num_replays += 1
        self._work()


def make_cuda_runtime(device: str) -> DeviceRuntime:
    """Raises Unsupported where torch has no CUDA, or there is no such GPU."""
    if not torch.cuda.is_available():
        raise Unsupported(f"'{device}' can't be used: torch {torch.__version__} finds no NVIDIA GPU here")
    chosen = torch.device(device)
    if (chosen.index or 0) >= torch.cuda.device_count():
        raise Unsupported(f"'{device}' can't be used: this process sees {torch.cuda.device_count()} GPUs")
    return CudaRuntime(torch.device("cuda", chosen.index or 0))


def make_simulated_runtime() -> DeviceRuntime:
    """Of the size that the server gave the device (--simulated-device)."""
    given = os.environ.get("ENGINEHOUSE_SIMULATED_BYTES", "").split(",")[0]
    return SimulatedRuntime(memory_bytes=int(given or 1 << 30))
