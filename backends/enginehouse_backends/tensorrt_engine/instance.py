"""One instance of a plan: an execution context for each profile, buffers that grow, captured CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from enginehouse.backend import TensorInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import Internal, InvalidArgument
from enginehouse.types import Array, DeviceData, Tensor, TensorSpec
from enginehouse_backends.signature import InputChecker
from enginehouse_backends.tensorrt_engine.engine import Engine, PlanTensor
from enginehouse_backends.tensorrt_engine.memory import Memory, address_on, here_or_host
from enginehouse_backends.tensorrt_engine.profiles import (
    GraphShape,
    Shape,
    choose_profile,
    smallest_holding,
)


class HostBytes:
    """Where TensorRT writes a shape tensor that is an output."""

    def __init__(self, num_bytes: int) -> None:
        self._array = np.zeros(num_bytes, np.uint8)
        self.data = memoryview(self._array.data)

    def data_ptr(self) -> int:
        return self._array.ctypes.data


@dataclass(slots=True)
class CapturedGraph:
    """A recorded run with memory of its own, because the addresses are part of the recording."""

    profile: int
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    output_shapes: dict[str, Shape]
    replay: Callable[[], None]


class TensorRTInstance(TensorInstance):
    def __init__(self, config: ModelConfig, engine: Engine, memory: Memory, profile_numbers: Sequence[int]) -> None:
        self._name = config.name
        self._batches = config.max_batch_size > 0
        self._engine = engine
        self._memory = memory
        self._profiles = engine.profiles_of(profile_numbers)
        specs = [TensorSpec(tensor.name, tensor.datatype, ()) for tensor in engine.inputs]
        self._checker = InputChecker(config.name, specs)
        self._configured = [output.name for output in config.output] or [tensor.name for tensor in engine.outputs]
        self._buffers: dict[str, Any] = {}
        self._growing: dict[str, Any] = {}
        with memory.use():
            self._context_by_profile = {number: self._new_context(number) for number in profile_numbers}
            self._graph_shapes, self._graphs = self._capture_graphs(config)

    def _new_context(self, profile: int) -> Any:
        context = self._engine.handle.create_execution_context()
        if context is None:
            raise Internal(f"model '{self._name}': TensorRT makes no execution context: {self._engine.logger.take()}")
        self._must(context.set_optimization_profile_async(profile, self._memory.stream_handle), "choose a profile")
        self._memory.synchronize()
        return context

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise Internal(f"TensorRT, model '{self._name}': can't {what}: {self._engine.logger.take()}")

    # --- running

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Mapping[str, Tensor]:
        self._checker.check(inputs)
        known = {tensor.name: tensor for tensor in self._engine.outputs}
        unknown = [name for name in outputs if name not in known]
        if unknown:
            raise InvalidArgument(
                f"unexpected inference output '{unknown[0]}' for model '{self._name}', allowed outputs are: "
                f"{', '.join(known)}"
            )
        values = self._host_values(inputs)
        shapes = {name: tensor.shape for name, tensor in inputs.items() if name not in values}
        with self._memory.use():
            chosen = smallest_holding(self._graph_shapes, shapes) if not values else None
            results = self._replay(chosen, inputs) if chosen is not None else self._execute(inputs, shapes, values)
            wanted = outputs or self._configured
            rows = next(iter(shapes.values()), (0,))[:1] if chosen is not None and self._batches else None
            return self._fetched([known[name] for name in wanted], results, rows)

    def _host_values(self, inputs: Mapping[str, Tensor]) -> dict[str, Array]:
        """Contents of shape tensors. Where the plan batches, the batch's rows come before the client's values."""
        found: dict[str, Array] = {}
        for plan_tensor in self._engine.inputs:
            if not plan_tensor.is_on_host or plan_tensor.name not in inputs:
                continue
            array = inputs[plan_tensor.name].numpy().reshape(-1)
            num_values = plan_tensor.dims[0] if plan_tensor.dims else 1
            if self._batches and len(array) != num_values:
                rows = np.array([self._num_rows(inputs)], array.dtype)
                array = np.concatenate([rows, array[: num_values - 1]])
            found[plan_tensor.name] = np.ascontiguousarray(array)
        return found

    def _num_rows(self, inputs: Mapping[str, Tensor]) -> int:
        on_host = {tensor.name for tensor in self._engine.inputs if tensor.is_on_host}
        return next((tensor.shape[0] for name, tensor in inputs.items() if name not in on_host), 1)

    def _execute(
        self, inputs: Mapping[str, Tensor], shapes: Mapping[str, Shape], values: Mapping[str, Array]
    ) -> dict[str, tuple[Any, Shape]]:
        asked = {**shapes, **{name: tuple(int(value) for value in array) for name, array in values.items()}}
        context = self._context_by_profile[choose_profile(self._name, self._profiles, asked)]
        for name, array in values.items():
            self._must(context.set_tensor_address(name, array.ctypes.data), f"take shape tensor '{name}'")
        for name, shape in shapes.items():
            self._must(context.set_input_shape(name, shape), f"take {list(shape)} for input '{name}'")
            self._must(context.set_tensor_address(name, self._place_input(inputs[name])), f"take input '{name}'")
        missing = context.infer_shapes()
        if missing:
            raise InvalidArgument(f"model '{self._name}': TensorRT needs the shapes of {', '.join(missing)}")
        places = self._place_outputs(context)
        self._must(context.execute_async_v3(self._memory.stream_handle), "run")
        return {name: self._result(place) for name, place in places.items()}

    def _place_input(self, tensor: Tensor) -> int:
        """An address on the device: where the tensor is, or a buffer that it is copied to."""
        address = address_on(self._memory.device, tensor.data)
        if address is not None:
            return address
        data = here_or_host(self._memory.device, tensor.data)
        buffer = self._buffer(tensor.name, data.nbytes)
        self._memory.upload(tensor.name, buffer, data)
        return int(buffer.data_ptr())

    def _place_outputs(self, context: Any) -> dict[str, Any]:
        """By output, its buffer and shape; an allocator where only running tells the shape."""
        places: dict[str, Any] = {}
        for tensor in self._engine.outputs:
            shape = tuple(context.get_tensor_shape(tensor.name))
            if -1 in shape:
                allocator = self._growing.setdefault(
                    tensor.name, new_output_allocator(self._engine.library, self._memory)
                )
                self._must(context.set_output_allocator(tensor.name, allocator), f"place output '{tensor.name}'")
                places[tensor.name] = allocator
                continue
            num_bytes = tensor.num_bytes(shape)
            buffer = HostBytes(num_bytes) if tensor.is_on_host else self._buffer(tensor.name, num_bytes)
            self._must(context.set_tensor_address(tensor.name, buffer.data_ptr()), f"place output '{tensor.name}'")
            places[tensor.name] = (buffer, shape)
        return places

    @staticmethod
    def _result(place: Any) -> tuple[Any, Shape]:
        return place if isinstance(place, tuple) else (place.buffer, place.shape)

    def _buffer(self, name: str, num_bytes: int) -> Any:
        """The tensor's own, kept from batch to batch and never made smaller."""
        held = self._buffers.get(name)
        if held is None or held.numel() < num_bytes:
            held = self._buffers[name] = self._memory.allocate(num_bytes)
        return held

    def _fetched(
        self, tensors: Sequence[PlanTensor], results: Mapping[str, tuple[Any, Shape]], rows: Shape | None
    ) -> dict[str, Tensor]:
        """In host memory, or kept in a copy of its own on the device: the buffers are the next batch's, too. `rows`:
        how many of a larger captured batch are real."""
        fetched: dict[str, Tensor] = {}
        for tensor in tensors:
            buffer, shape = results[tensor.name]
            shape = (*rows, *shape[1:]) if rows is not None else shape
            num_bytes = tensor.num_bytes(shape)
            if isinstance(buffer, HostBytes):
                data: memoryview | DeviceData = buffer.data
            elif tensor.name in self.kept_outputs:
                data = self._memory.keep(buffer, num_bytes)
            else:
                data = self._memory.download(buffer, num_bytes)
            fetched[tensor.name] = Tensor(tensor.name, tensor.datatype, shape, data)
        self._memory.synchronize()
        return fetched

    # --- CUDA graphs

    def _capture_graphs(self, config: ModelConfig) -> tuple[list[GraphShape], list[CapturedGraph]]:
        if not config.optimization.cuda.graphs or any(tensor.is_on_host for tensor in self._engine.inputs):
            return [], []
        shapes = wanted_graphs(config, self._engine)
        return shapes, [self._capture(shape.shapes) for shape in shapes]

    def _capture(self, shapes: Mapping[str, Shape]) -> CapturedGraph:
        profile = choose_profile(self._name, self._profiles, shapes)
        context = self._context_by_profile[profile]
        tensors = {tensor.name: tensor for tensor in self._engine.tensors}
        buffers = {name: self._memory.allocate(tensors[name].num_bytes(shape)) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            self._must(context.set_input_shape(name, shape), f"take {list(shape)} for input '{name}'")
            self._must(context.set_tensor_address(name, buffers[name].data_ptr()), f"take input '{name}'")
        context.infer_shapes()
        output_shapes = {t.name: tuple(context.get_tensor_shape(t.name)) for t in self._engine.outputs}
        if any(-1 in shape for shape in output_shapes.values()):
            raise InvalidArgument(
                f"model '{self._name}': optimization.cuda.graphs can't be, because only running tells the shapes of "
                f"its outputs"
            )
        outputs = {name: self._memory.allocate(tensors[name].num_bytes(shape)) for name, shape in output_shapes.items()}
        for name, buffer in outputs.items():
            self._must(context.set_tensor_address(name, buffer.data_ptr()), f"place output '{name}'")

        def work() -> None:
            self._must(context.execute_async_v3(self._memory.stream_handle), "run")

        work()  # TensorRT settles what depends on shapes in the first run, which can't be captured
        self._memory.synchronize()
        return CapturedGraph(profile, buffers, outputs, output_shapes, self._memory.capture(work))

    def _replay(self, index: int, inputs: Mapping[str, Tensor]) -> dict[str, tuple[Any, Shape]]:
        graph = self._graphs[index]
        for name, buffer in graph.inputs.items():
            self._memory.upload(name, buffer, here_or_host(self._memory.device, inputs[name].data))
        graph.replay()
        return {name: (buffer, graph.output_shapes[name]) for name, buffer in graph.outputs.items()}

    def close(self) -> None:
        self._memory.synchronize()
        self._graphs.clear()
        self._graph_shapes.clear()
        self._context_by_profile.clear()
        self._buffers.clear()
        self._growing.clear()


def wanted_graphs(config: ModelConfig, engine: Engine) -> list[GraphShape]:
    """What `optimization.cuda.graph_spec` lists; else batches of 1, the preferred sizes and the largest."""
    specs = config.optimization.cuda.graph_spec
    if specs:
        return [_of_spec(config, engine, spec) for spec in specs]
    if any(-1 in tensor.dims[1:] for tensor in engine.inputs):
        raise InvalidArgument(
            f"model '{config.name}': optimization.cuda.graphs needs graph_spec, because more than the batch varies"
        )
    if config.max_batch_size < 1:
        return [GraphShape({tensor.name: tensor.dims for tensor in engine.inputs}, 0)]
    sizes = sorted({1, *config.dynamic_batching.preferred_batch_size, config.max_batch_size})
    return [
        GraphShape({tensor.name: (size, *tensor.dims[1:]) for tensor in engine.inputs}, size)
        for size in sizes
        if size <= config.max_batch_size
    ]


def _of_spec(config: ModelConfig, engine: Engine, spec: Any) -> GraphShape:
    batch = (spec.batch_size,) if config.max_batch_size > 0 else ()
    shapes = {}
    for tensor in engine.inputs:
        rest = tensor.dims[len(batch) :]
        given = tuple(spec.input[tensor.name].dim) if tensor.name in spec.input else rest
        if len(given) != len(rest) or -1 in given:
            raise InvalidArgument(
                f"model '{config.name}': optimization.cuda.graph_spec gives {list(given)} for input '{tensor.name}', "
                f"whose dimensions are {list(rest)}: every one needs a size"
            )
        shapes[tensor.name] = (*batch, *given)
    least = spec.graph_lower_bound.batch_size or spec.batch_size
    return GraphShape(shapes, least)


def new_output_allocator(library: Any, memory: Memory) -> Any:
    """Makes room for an output whose size is known only once it has been computed."""

    class OutputAllocator(library.IOutputAllocator):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            library.IOutputAllocator.__init__(self)
            self.buffer = memory.allocate(1)
            self.shape: Shape = (0,)

        def reallocate_output_async(self, name: str, address: int, size: int, alignment: int, stream: int) -> int:
            if self.buffer.numel() < size:
                self.buffer = memory.allocate(size)
            return int(self.buffer.data_ptr())

        def notify_shape(self, name: str, shape: Any) -> None:
            self.shape = tuple(shape)

    return OutputAllocator()


def priority_of(config: ModelConfig) -> int:
    """CUDA's stream priority: lower numbers first."""
    return -1 if config.optimization.priority == config.optimization.PRIORITY_MAX else 0


def pinned(optimization: Any, field: str) -> bool:
    """Triton's default is to pin."""
    return bool(getattr(optimization, field).enable) if optimization.HasField(field) else True
