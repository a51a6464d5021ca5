"""ONNX models in ONNX Runtime: one session a device, shared by the instances there.

ONNX Runtime releases the GIL while it computes, so instances live in threads of the server on a CPU. Inputs
are read where they lie, and outputs are handed on as views of ONNX Runtime's memory.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from enginehouse.backend import (
    Backend,
    HostKind,
    LoadContext,
    MemoryNeeds,
    Model,
    Placement,
    TensorInstance,
)
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError, Internal, InvalidArgument, NotFound, Unsupported
from enginehouse.types import Array, DataType, DeviceData, Tensor, TensorSpec
from enginehouse_backends.artifacts import artifact_path, total_bytes
from enginehouse_backends.onnx_runtime.onnx_file import OnnxFile, OnnxValue, read_onnx_file
from enginehouse_backends.onnx_runtime.session_settings import (
    CPU,
    CUDA,
    providers,
    run_options,
    session_options,
    set_global_threads,
)
from enginehouse_backends.signature import (
    DEFAULT_MAX_BATCH_SIZE,
    InputChecker,
    Signature,
    check_config,
    complete_config,
)

DATATYPE_BY_ELEMENT_TYPE = {
    1: DataType.FP32, 2: DataType.UINT8, 3: DataType.INT8, 4: DataType.UINT16, 5: DataType.INT16,
    6: DataType.INT32, 7: DataType.INT64, 8: DataType.BYTES, 9: DataType.BOOL, 10: DataType.FP16,
    11: DataType.FP64, 12: DataType.UINT32, 13: DataType.UINT64, 16: DataType.BF16,
}  # fmt: skip
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
UNKEPT = (DataType.BYTES, DataType.BF16)
"""Outputs that always come to the host: ONNX Runtime's Python interface can't fetch them from a device later."""
ELEMENT_TYPE_BY_DATATYPE = {datatype: number for number, datatype in DATATYPE_BY_ELEMENT_TYPE.items()}


class OnnxRuntimeBackend(Backend):
    name = "onnxruntime"
    default_filename = "model.onnx"

    def host_kind(self, config: ModelConfig) -> HostKind:
        on_gpu = any(group.kind == group.KIND_GPU for group in config.instance_group)
        return HostKind.DEVICE if on_gpu else HostKind.THREAD

    def complete_config(self, context: LoadContext) -> ModelConfig:
        options = context.backend_options
        default_max_batch_size = int(options.get("default-max-batch-size", DEFAULT_MAX_BATCH_SIZE))
        return complete_config(context.config, read_signature(onnx_path(context)), default_max_batch_size)

    def memory_needs(self, context: LoadContext) -> MemoryNeeds:
        path = onnx_path(context)
        return MemoryNeeds(weights_bytes=total_bytes(path, *external_paths(path, read_onnx_file(path))))

    def load(self, context: LoadContext) -> Model:
        return OnnxModel(context)


def onnx_path(context: LoadContext) -> Path:
    """model.onnx, or the one inside a folder of that name (where large weights lie beside it)."""
    path = artifact_path(context, OnnxRuntimeBackend.default_filename)
    inner = path / OnnxRuntimeBackend.default_filename
    if path.is_dir() and not inner.is_file():
        raise NotFound(f"model '{context.name}': {path} is a folder without a {inner.name}")
    return inner if path.is_dir() else path


def external_paths(path: Path, file: OnnxFile) -> list[Path]:
    return [path.parent / name for name in file.external_files]


def read_signature(path: Path) -> Signature:
    """From the file alone if it says all; else ONNX Runtime infers the shapes of the outputs."""
    file = read_onnx_file(path)
    missing = [str(weights) for weights in external_paths(path, file) if not weights.is_file()]
    if missing:
        raise NotFound(f"{path} keeps weights in {', '.join(missing)}, which is not there")
    if any(value.dims is None and value.kind == "tensor" for value in (*file.inputs, *file.outputs)):
        file = _with_inferred_shapes(path, file)
    unusable = {v.name: v.kind for v in file.outputs if v.element_type not in DATATYPE_BY_ELEMENT_TYPE}
    for value in file.inputs:
        if value.element_type not in DATATYPE_BY_ELEMENT_TYPE:
            raise Unsupported(
                f"{path}: input '{value.name}' is a {value.kind} of ONNX type {value.element_type}, which no "
                f"tensor of the protocol can hold"
            )
    return Signature(
        file=str(path),
        inputs=(
            *(_spec(value) for value in file.inputs),
            *(_spec(value, optional=True) for value in file.defaulted_inputs),
        ),
        outputs=tuple(_spec(value) for value in file.outputs if value.name not in unusable),
        batches=False if _mixes_up_batches(file) else None,
        unusable=unusable,
    )


def _spec(value: OnnxValue, optional: bool = False) -> TensorSpec:
    dims = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in value.dims or ())
    return TensorSpec(value.name, DATATYPE_BY_ELEMENT_TYPE[value.element_type], dims, optional)


def _mixes_up_batches(file: OnnxFile) -> bool:
    """True if an output's first dimension is a later one of an input: its rows aren't the requests'."""
    later = {dim for value in file.inputs for dim in (value.dims or ())[1:] if isinstance(dim, str) and dim}
    first = {value.dims[0] for value in file.inputs if value.dims}
    return any(value.dims and value.dims[0] in later - first for value in file.outputs)


def _with_inferred_shapes(path: Path, file: OnnxFile) -> OnnxFile:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = new_session(path, options, [(CPU, {})])
    dims_by_name = {
        node.name: tuple(dim if isinstance(dim, int) else dim or "" for dim in node.shape or ())
        for node in (*session.get_inputs(), *session.get_outputs())
    }

    def inferred(value: OnnxValue) -> OnnxValue:
        dims = value.dims if value.dims is not None else dims_by_name.get(value.name)
        return OnnxValue(value.name, value.element_type, dims, value.kind)

    inputs, outputs = map(inferred, file.inputs), map(inferred, file.outputs)
    return OnnxFile(tuple(inputs), file.defaulted_inputs, tuple(outputs), file.external_files)


def new_session(path: Path, options: Any, provider_list: Any) -> Any:
    """Raises InvalidArgument, naming the file, for a model that ONNX Runtime refuses."""
    try:
        # with its fallback on, ONNX Runtime would print and go on with other providers
        return onnxruntime.InferenceSession(str(path), options, providers=provider_list, enable_fallback=0)
    except Exception as problem:
        raise InvalidArgument(f"ONNX Runtime can't load {path}: {_reason(problem)}") from problem


def preload_cuda() -> str:
    """Finds CUDA's libraries where pip put them. What ONNX Runtime prints of those that it can't find."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        onnxruntime.preload_dlls()
    return "; ".join(line for line in printed.getvalue().splitlines() if line.startswith("Failed"))


class OnnxModel(Model):
    """Sessions by device: made for the first instance there, used by all of them at once."""

    def __init__(self, context: LoadContext) -> None:
        self.context = context
        self.path = onnx_path(context)
        self.signature = read_signature(self.path)
        check_config(context.config, self.signature)
        self._lock = threading.Lock()  # guards _session_by_device while instances are made
        self._session_by_device: dict[str, Any] = {}

    def create_instance(self, placement: Placement) -> TensorInstance:
        device = self._choose(placement.device)
        with self._lock:
            if device not in self._session_by_device:
                self._session_by_device[device] = self._make_session(device)
            session = self._session_by_device[device]
        return self._instance_class(device)(self, session, device)

    def _instance_class(self, device: str) -> type[OnnxInstance]:
        """ONNX Runtime's Python interface binds no strings, and runs no BF16 without binding."""
        takes_strings = any(spec.datatype is DataType.BYTES for spec in self.signature.inputs)
        uses_bf16 = any(spec.datatype is DataType.BF16 for spec in (*self.signature.inputs, *self.signature.outputs))
        if takes_strings and uses_bf16:
            raise Unsupported(f"{self.path} takes strings and has BF16 tensors: ONNX Runtime runs no such mix")
        wants_binding = device != "cpu" or uses_bf16
        return BoundOnnxInstance if wants_binding and not takes_strings else OnnxInstance

    def _choose(self, device: str) -> str:
        """KIND_MODEL leaves it to us: the first GPU if there is one and this onnxruntime can use it, else the CPU."""
        if device != "model":
            return device
        can_use_gpus = CUDA in onnxruntime.get_available_providers() and NVIDIA_DRIVER.exists()
        return "cuda:0" if can_use_gpus else "cpu"

    def _make_session(self, device: str) -> Any:
        config = self.context.config
        wanted = providers(config, device, onnxruntime.get_available_providers())
        set_global_threads(self.context.backend_options)
        missing_libraries = preload_cuda() if device != "cpu" else ""
        session = new_session(self.path, session_options(self.context), wanted)
        failed = [name for name, _ in wanted if name not in session.get_providers()]
        if failed:  # ONNX Runtime leaves such a provider out without an error
            raise Unsupported(
                f"model '{config.name}': {', '.join(failed)} can't start on {device}: no driver, or a library is "
                f"missing ({missing_libraries or 'see the log'}); onnxruntime-gpu[cuda,cudnn] brings the libraries"
            )
        return session

    def close(self) -> None:
        self._session_by_device.clear()


class OnnxInstance(TensorInstance):
    """On a CPU: arrays in, arrays out, none of them copied."""

    def __init__(self, model: OnnxModel, session: Any, device: str) -> None:
        self.device = device
        self._model_name = model.context.name
        self._session: Any = session
        self._run_options = run_options(model.context.config)
        self._checker = InputChecker(model.context.name, model.signature.inputs)
        self._datatype_by_output = {spec.name: spec.datatype for spec in model.signature.outputs}
        configured = [output.name for output in model.context.config.output]
        state = [state.output_name for state in model.context.config.sequence_batching.state]
        self._default_outputs = [*configured, *state] or list(self._datatype_by_output)

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Mapping[str, Tensor]:
        self._checker.check(inputs)
        names = list(outputs) or self._default_outputs
        try:
            return self._compute(inputs, names)
        except EnginehouseError:
            raise
        except Exception as problem:
            raise self._run_error(problem, names) from problem

    def _compute(self, inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        feed = {name: input_array(tensor) for name, tensor in inputs.items()}
        arrays = self._session.run(names, feed, self._run_options)
        return {
            name: Tensor.from_numpy(name, array, self._datatype_by_output[name])
            for name, array in zip(names, arrays, strict=True)
        }

    def _run_error(self, problem: Exception, names: Sequence[str]) -> EnginehouseError:
        unknown = [name for name in names if name not in self._datatype_by_output]
        if unknown:
            return InvalidArgument(
                f"unexpected inference output '{unknown[0]}' for model '{self._model_name}', allowed outputs "
                f"are: {', '.join(self._datatype_by_output)}"
            )
        text = f"ONNX Runtime, model '{self._model_name}': {_reason(problem)}"
        return InvalidArgument(text) if isinstance(problem, ort_errors.InvalidArgument) else Internal(text)

    def close(self) -> None:
        self._session = None


class BoundOnnxInstance(OnnxInstance):
    """By I/O binding: for GPUs, where inputs may already be, and for BF16, which has no numpy type."""

    def _compute(self, inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        binding = self._session.io_binding()
        kind, _, index = self.device.partition(":")
        held = [bind_input(binding, tensor) for tensor in inputs.values()]
        for name in names:
            if name in self.kept_outputs and self._datatype_by_output[name] not in UNKEPT:
                binding.bind_output(name, kind, int(index or 0))
            else:
                binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding, self._run_options)
        del held
        values = zip(names, binding.get_outputs(), strict=True)
        return {name: self._tensor(name, value) for name, value in values}

    def _tensor(self, name: str, value: Any) -> Tensor:
        datatype = self._datatype_by_output[name]
        if datatype is DataType.BYTES:
            return Tensor.from_numpy(name, value.numpy(), datatype)
        shape = tuple(value.shape())
        if value.device_name() != "cpu":
            return Tensor(name, datatype, shape, OrtDeviceData(value, self.device))
        array = np.asarray(OrtMemory(value, datatype, shape))
        return Tensor.from_numpy(name, array, datatype)


class OrtMemory:
    """The memory of an OrtValue for numpy to view; it lives as long as the array."""

    def __init__(self, value: Any, datatype: DataType, shape: tuple[int, ...]) -> None:
        self.value = value
        self.__array_interface__ = {
            "data": (value.data_ptr(), False),
            "shape": shape,
            "typestr": datatype.numpy.str,
            "version": 3,
        }


class OrtDeviceData(DeviceData):
    """An output that stayed on the device."""

    def __init__(self, value: Any, device: str) -> None:
        self.value = value
        self.nbytes = value.tensor_size_in_bytes()
        self.device = device
        self.pointer = value.data_ptr()

    def to_host(self) -> memoryview:
        return memoryview(np.ascontiguousarray(self.value.numpy()).reshape(-1).view(np.uint8).data)


def input_array(tensor: Tensor) -> Array:
    """A view of the tensor's bytes; strings become an array of str, which is what ONNX Runtime takes."""
    array = tensor.numpy()
    if tensor.datatype is not DataType.BYTES:
        return array
    texts = np.empty(array.shape, dtype=object)
    for index, element in enumerate(array.flat):
        try:
            texts.flat[index] = element.decode()
        except UnicodeDecodeError as problem:
            raise InvalidArgument(
                f"element {index} of input '{tensor.name}' is not UTF-8, which strings of ONNX models must "
                f"be: {problem}"
            ) from None
    return texts


def bind_input(binding: Any, tensor: Tensor) -> Any:
    """Binds without copying where the memory allows it; gives back what must outlive the run."""
    element_type = ELEMENT_TYPE_BY_DATATYPE[tensor.datatype]
    pointer = getattr(tensor.data, "pointer", None)
    if pointer is not None and isinstance(tensor.data, DeviceData):
        kind, _, index = tensor.data.device.partition(":")
        binding.bind_input(tensor.name, kind, int(index or 0), element_type, tensor.shape, pointer)
        return tensor.data
    array = tensor.numpy()
    binding.bind_input(tensor.name, "cpu", 0, element_type, tensor.shape, array.ctypes.data)
    return array


def _reason(problem: Exception) -> str:
    """ONNX Runtime's text without its prefix `[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : `."""
    text = str(problem).strip()
    return text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
