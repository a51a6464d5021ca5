"""A deserialized plan, and what it says of its tensors and profiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginehouse.errors import InvalidArgument, Unsupported
from enginehouse.types import DataType, TensorSpec
from enginehouse_backends.signature import Signature
from enginehouse_backends.tensorrt_engine.library import new_logger
from enginehouse_backends.tensorrt_engine.profiles import Profile, Range, Shape

DATATYPE_BY_NAME = {
    "FLOAT": DataType.FP32, "HALF": DataType.FP16, "BF16": DataType.BF16, "INT8": DataType.INT8,
    "INT32": DataType.INT32, "INT64": DataType.INT64, "UINT8": DataType.UINT8, "BOOL": DataType.BOOL,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlanTensor:
    name: str
    datatype: DataType
    dims: Shape
    is_input: bool
    is_on_host: bool
    """A shape tensor: TensorRT reads its values on the CPU before the kernels run."""
    vectorized_dim: int = -1
    num_components: int = 1
    """Formats like CHW4 hold this many values of `vectorized_dim` together, the last group filled up."""

    def num_bytes(self, shape: Sequence[int]) -> int:
        sizes = list(shape)
        if self.vectorized_dim >= 0:
            size = sizes[self.vectorized_dim]
            sizes[self.vectorized_dim] = -(-size // self.num_components) * self.num_components
        return math.prod(sizes) * self.datatype.item_size


class Engine:
    """One plan on one device, shared by the instances there. Raises InvalidArgument for a file that is none."""

    def __init__(self, library: Any, path: Path, *, runs_host_code: bool) -> None:
        self.library = library
        self.path = path
        self.logger = new_logger(library)
        self._runtime = library.Runtime(self.logger)
        if runs_host_code:
            self._runtime.engine_host_code_allowed = True
        self.handle = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.handle is None:
            raise InvalidArgument(
                f"TensorRT {library.__version__} can't load {path}: {self.logger.take()}. A plan runs on the TensorRT "
                f"version and the kind of GPU that it was built for: build it here with `enginehouse convert`"
            )
        self.tensors = [self._tensor(index) for index in range(self.handle.num_io_tensors)]
        self.profiles = [self._profile(number) for number in range(self.handle.num_optimization_profiles)]

    def _tensor(self, index: int) -> PlanTensor:
        handle = self.handle
        name = handle.get_tensor_name(index)
        kind = handle.get_tensor_dtype(name).name
        if kind not in DATATYPE_BY_NAME:
            raise Unsupported(f"{self.path}: tensor '{name}' is {kind}, which the protocol can't carry")
        vectorized_dim = handle.get_tensor_vectorized_dim(name)
        return PlanTensor(
            name,
            DATATYPE_BY_NAME[kind],
            tuple(handle.get_tensor_shape(name)),
            handle.get_tensor_mode(name) == self.library.TensorIOMode.INPUT,
            handle.get_tensor_location(name) == self.library.TensorLocation.HOST,
            vectorized_dim,
            handle.get_tensor_components_per_element(name) if vectorized_dim >= 0 else 1,
        )

    def _profile(self, number: int) -> Profile:
        """Only of inputs that vary."""
        ranges: dict[str, Range] = {}
        for tensor in self.tensors:
            if not tensor.is_input:
                continue
            if tensor.is_on_host:
                # positional: the binding's own documentation has the two names the wrong way round
                values = self.handle.get_tensor_profile_values(number, tensor.name)
            elif -1 in tensor.dims:
                values = self.handle.get_tensor_profile_shape(tensor.name, number)
            else:
                continue
            ranges[tensor.name] = Range(*(tuple(value) for value in values))
        return ranges

    @property
    def inputs(self) -> list[PlanTensor]:
        return [tensor for tensor in self.tensors if tensor.is_input]

    @property
    def outputs(self) -> list[PlanTensor]:
        return [tensor for tensor in self.tensors if not tensor.is_input]

    @property
    def max_rows(self) -> int:
        """The largest batch of any profile; 0 for a plan without a free first dimension."""
        most = [
            ranges[tensor.name].most[0]
            for ranges in self.profiles
            for tensor in self.inputs
            if not tensor.is_on_host and tensor.name in ranges and tensor.dims[:1] == (-1,)
        ]
        return max(most, default=0)

    @property
    def shape_tensors(self) -> set[str]:
        return {tensor.name for tensor in self.tensors if tensor.is_on_host}

    @property
    def signature(self) -> Signature:
        """Without shape tensors: they have no batch axis, and clients leave the batch out of their values."""

        def specs(tensors: Sequence[PlanTensor]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(t.name, t.datatype, t.dims) for t in tensors if not t.is_on_host)

        varying = [tensor for tensor in self.tensors if not tensor.is_on_host]
        batches = bool(varying) and all(tensor.dims[:1] == (-1,) for tensor in varying)
        return Signature(str(self.path), specs(self.inputs), specs(self.outputs), batches)

    def profiles_of(self, numbers: Sequence[int]) -> Mapping[int, Profile]:
        return {number: self.profiles[number] for number in numbers}
