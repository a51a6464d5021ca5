"""TensorRT without a GPU: plans that are JSON and compute with numpy in host memory.

Every call of a method goes through `check_call`, so a call that the real library (of the version that the
fake was made for) would refuse fails here too.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import json
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from enginehouse.types import DeviceData
from enginehouse_backends.tensorrt_engine.memory import KeptBytes

from .tensorrt_signatures import check_call, recorded

NUMPY_BY_KIND = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "INT8": np.int8}


def tensor(
    name: str, dims: Sequence[int], kind: str = "FLOAT", *, output: bool = False, on_host: bool = False, **more: Any
) -> dict[str, Any]:
    return {"name": name, "dims": list(dims), "kind": kind, "output": output, "on_host": on_host, **more}


def plan(tensors: Sequence[Any], profiles: Sequence[Any], computes: str) -> bytes:
    """`profiles`: by input, least, best and most. `computes`: a function of `FUNCTIONS`."""
    return json.dumps({"tensors": list(tensors), "profiles": list(profiles), "computes": computes}).encode()


def positive(x: Any) -> Any:
    return x[x > 0]


def reshaped(x: Any, shape: Any) -> Any:
    return np.broadcast_to(x[:, :1], tuple(shape)).copy()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add_one": lambda x: x + 1,
    "sum": lambda x, y: x + y,
    "positive": positive,
    "reshaped": reshaped,
    "same": lambda x: x,
}


class HostMemory:
    """The backend's Memory, on a CPU: nothing is asynchronous, and a captured graph keeps what was run."""

    device = "cuda:0"
    stream_handle = 0

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed = 0

    def use(self) -> Any:
        return contextlib.nullcontext()

    def allocate(self, num_bytes: int) -> Any:
        return torch.full((max(num_bytes, 1),), 0xEE, dtype=torch.uint8)

    def upload(self, name: str, target: Any, source: memoryview | DeviceData) -> None:
        raw = source if isinstance(source, memoryview) else source.to_host()
        ctypes.memmove(target.data_ptr(), bytes(raw), raw.nbytes)

    def keep(self, source: Any, num_bytes: int) -> DeviceData:
        return KeptBytes(source[:num_bytes].clone(), self.device)

    def download(self, source: Any, num_bytes: int) -> memoryview:
        return memoryview(bytes(source[:num_bytes].numpy()))

    def synchronize(self) -> None:
        assert not RECORDERS, "CUDA allows no waiting while it captures"

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What runs meanwhile is kept with its addresses and shapes, as CUDA does, and not run."""
        self.num_captured += 1
        kernels: list[Callable[[], None]] = []
        RECORDERS.append(kernels)
        work()
        RECORDERS.pop()

        def replay() -> None:
            self.num_replayed += 1
            for kernel in kernels:
                kernel()

        return replay


RECORDERS: list[list[Callable[[], None]]] = []
"""The graph that is being captured, if one is."""


def view(address: int, dtype: Any, shape: Sequence[int]) -> Any:
    count = int(np.prod(shape))
    buffer = (ctypes.c_char * max(count * np.dtype(dtype).itemsize, 1)).from_address(address)
    return np.frombuffer(buffer, dtype=dtype, count=count).reshape(shape)


def make_library(version: str) -> Any:
    """A module like `tensorrt` of that version."""
    library: Any = types.ModuleType("tensorrt")
    library.__version__ = version
    properties = set(recorded()[version]["properties"])

    class Checked:
        """Calls of public methods must fit the recorded signatures; so must assigned properties."""

        def __init_subclass__(cls, **more: Any) -> None:
            super().__init_subclass__(**more)
            for name, member in list(vars(cls).items()):
                if callable(member) and not name.startswith("_"):
                    setattr(cls, name, checked(cls.__name__, name, member))

        def __setattr__(self, name: str, value: Any) -> None:
            assert name.startswith("_") or f"{type(self).__name__}.{name}" in properties, name
            object.__setattr__(self, name, value)

    def checked(class_name: str, name: str, member: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any) -> Any:
            check_call(version, f"{class_name}.{name}", arguments)
            return member(self, *arguments)

        return call

    class ILogger:
        Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)

        def __init__(self) -> None:
            self.min_severity = self.Severity.WARNING

    class IOutputAllocator:
        pass

    class Runtime(Checked):
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            check_call(version, "Runtime.__init__", (logger,))
            self._logger = logger

        def deserialize_cuda_engine(self, serialized: Any) -> Any:
            try:
                return ICudaEngine(json.loads(serialized), self._logger)
            except ValueError as problem:
                self._logger.log(ILogger.Severity.ERROR, f"magic tag does not match: {problem}")
                return None

    class ICudaEngine(Checked):
        def __init__(self, content: Any, logger: Any) -> None:
            self._content = content
            self._logger = logger
            self._by_name = {one["name"]: one for one in content["tensors"]}

        @property
        def num_io_tensors(self) -> int:
            return len(self._content["tensors"])

        @property
        def num_optimization_profiles(self) -> int:
            return len(self._content["profiles"])

        def get_tensor_name(self, index: int) -> str:
            return str(self._content["tensors"][index]["name"])

        def get_tensor_dtype(self, name: str) -> Any:
            return library.DataType[self._by_name[name]["kind"]]

        def get_tensor_shape(self, name: str) -> Any:
            return tuple(self._by_name[name]["dims"])

        def get_tensor_mode(self, name: str) -> Any:
            return library.TensorIOMode.OUTPUT if self._by_name[name]["output"] else library.TensorIOMode.INPUT

        def get_tensor_location(self, name: str) -> Any:
            return library.TensorLocation.HOST if self._by_name[name]["on_host"] else library.TensorLocation.DEVICE

        def get_tensor_vectorized_dim(self, name: str) -> int:
            return int(self._by_name[name].get("vectorized_dim", -1))

        def get_tensor_components_per_element(self, name: str) -> int:
            return int(self._by_name[name].get("num_components", -1))

        def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
            return [tuple(shape) for shape in self._content["profiles"][profile][name]]

        def get_tensor_profile_values(self, profile: int, name: str) -> Any:
            return [list(values) for values in self._content["profiles"][profile][name]]

        def create_execution_context(self) -> Any:
            return IExecutionContext(self)

    class IExecutionContext(Checked):
        def __init__(self, engine: Any) -> None:
            self._engine = engine
            self._profile = -1
            self._shapes: dict[str, Any] = {}
            self._addresses: dict[str, int] = {}
            self._allocators: dict[str, Any] = {}

        def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
            self._profile = profile
            return True

        def _inputs(self) -> list[Any]:
            return [one for one in self._engine._content["tensors"] if not one["output"]]

        def set_input_shape(self, name: str, shape: Any) -> bool:
            ranges = self._engine._content["profiles"][self._profile].get(name)
            dims = self._engine._by_name[name]["dims"]
            if ranges is None:
                fits = list(shape) == dims
            else:
                fits = all(low <= size <= high for low, size, high in zip(ranges[0], shape, ranges[2], strict=True))
            if fits:
                self._shapes[name] = tuple(shape)
            else:
                self._engine._logger.log(ILogger.Severity.ERROR, f"{shape} is outside of profile {self._profile}")
            return bool(fits)

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return address != 0

        def set_output_allocator(self, name: str, allocator: Any) -> bool:
            self._allocators[name] = allocator
            return True

        def infer_shapes(self) -> list[str]:
            names = [one["name"] for one in self._inputs() if not one["on_host"]]
            return [name for name in names if name not in self._shapes]

        def get_tensor_shape(self, name: str) -> Any:
            if name in self._shapes:
                return self._shapes[name]
            computes = self._engine._content["computes"]
            if computes == "positive":
                return (-1,)
            return tuple(self._compute_shape(computes))

        def _compute_shape(self, computes: str) -> Any:
            if computes == "reshaped":
                (host,) = [one for one in self._inputs() if one["on_host"]]
                return view(self._addresses[host["name"]], NUMPY_BY_KIND[host["kind"]], host["dims"])
            return next(iter(self._shapes.values()))

        def execute_async_v3(self, stream: int) -> bool:
            shapes = {one["name"]: self._shapes.get(one["name"], one["dims"]) for one in self._inputs()}
            kernel = functools.partial(self._run, shapes, dict(self._addresses), stream)
            if RECORDERS:
                RECORDERS[-1].append(kernel)
            else:
                kernel()
            return True

        def _run(self, shapes: Any, addresses: dict[str, int], stream: int) -> None:
            values = [
                view(addresses[one["name"]], NUMPY_BY_KIND[one["kind"]], shapes[one["name"]]) for one in self._inputs()
            ]
            result = FUNCTIONS[self._engine._content["computes"]](*values)
            (output,) = [one for one in self._engine._content["tensors"] if one["output"]]
            result = np.ascontiguousarray(result, dtype=NUMPY_BY_KIND[output["kind"]])
            address = addresses.get(output["name"], 0)
            if output["name"] in self._allocators:
                allocator = self._allocators[output["name"]]
                address = allocator.reallocate_output_async(output["name"], 0, max(result.nbytes, 1), 256, stream)
                allocator.notify_shape(output["name"], result.shape)
            ctypes.memmove(address, result.ctypes.data, result.nbytes)

    enums = recorded()[version]["enums"]
    for name, members in enums.items():
        setattr(library, name, enum.Enum(name, members))
    for cls in (ILogger, IOutputAllocator, Runtime, ICudaEngine, IExecutionContext):
        setattr(library, cls.__name__, cls)
    return library
