"""One instance of a PyTorch model: tensors in, the program called, tensors out; on a CPU or a CUDA stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from enginehouse.backend import LoadContext, TensorInstance
from enginehouse.errors import EnginehouseError, Internal, InvalidArgument
from enginehouse.types import DataType, DeviceData, DevicePart, Tensor, TensorSpec
from enginehouse_backends.parameters import Parameters, default_threads
from enginehouse_backends.pytorch.naming import OutputPicker, bind_inputs
from enginehouse_backends.pytorch.programs import DATATYPE_BY_TORCH, Program, first_line
from enginehouse_backends.signature import InputChecker

TORCH_BY_DATATYPE = {datatype: dtype for dtype, datatype in DATATYPE_BY_TORCH.items()}
GUARD_PREFIXES = ("Guard failed", "Expected input at")
"""How errors of exported programs begin when a shape isn't what the model was exported for."""


class TorchInstance(TensorInstance):
    def __init__(self, context: LoadContext, program: Program, device: str) -> None:
        config = context.config
        self.device = device
        self._model_name = context.name
        self._program: Program | None = program
        switches = Parameters(config)
        self._has_batch_axis = config.max_batch_size > 0
        names = [entry.name for entry in config.input]
        self._argument_by_input = (
            {name: name for name in names}
            if program.takes_dict
            else bind_inputs(context.name, "the model", names, program.arguments)
        )
        specs = [TensorSpec(e.name, DataType.from_proto(e.data_type), (), e.optional) for e in config.input]
        self._checker = InputChecker(context.name, specs)
        self._datatype_by_output = {e.name: DataType.from_proto(e.data_type) for e in config.output}
        self._picker = OutputPicker(context.name, list(self._datatype_by_output))
        self._stream = self._new_stream(config.optimization.priority) if device.startswith("cuda") else None
        self._settings = self._make_settings(switches)
        self._cleans_cache = self._stream is not None and bool(switches.switch("ENABLE_CACHE_CLEANING"))
        asked = switches.number("INTRA_OP_THREAD_COUNT") or switches.number("NUM_THREADS")
        self._num_threads: int | None = asked or default_threads(config)

    def _new_stream(self, priority: int) -> Any:
        """PRIORITY_MAX (1) becomes the stream's -1, which CUDA runs first."""
        urgency = -1 if priority == 1 else 0
        return torch.cuda.Stream(self.device, priority=urgency)  # type: ignore[no-untyped-call]

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Mapping[str, Tensor]:
        assert self._program is not None, "a bug: the instance is closed"
        self._checker.check(inputs)
        unknown = [name for name in outputs if name not in self._datatype_by_output]
        if unknown:
            raise InvalidArgument(
                f"unexpected inference output '{unknown[0]}' for model '{self._model_name}', allowed outputs are: "
                f"{', '.join(self._datatype_by_output)}"
            )
        try:
            if self._num_threads is not None:
                self._enter_thread()
            with self._settings[0]() if len(self._settings) == 1 else self._several_settings():
                values = {self._argument_by_input[name]: self._to_torch(t) for name, t in inputs.items()}
                leaves = self._picker.pick(self._program.call(values), is_leaf, outputs)
                results = self._to_tensors(leaves, values)
            if self._cleans_cache:
                torch.cuda.empty_cache()
            return results
        except EnginehouseError:
            raise
        except Exception as problem:
            raise self._run_error(problem) from problem

    def _run_error(self, problem: Exception) -> EnginehouseError:
        text = f"PyTorch execute failure, model '{self._model_name}': {first_line(problem)}"
        if isinstance(problem, AssertionError | RuntimeError) and str(problem).startswith(GUARD_PREFIXES):
            return InvalidArgument(text)
        return Internal(text)

    def _make_settings(self, switches: Parameters) -> list[Callable[[], Any]]:
        """Context managers that hold for this thread while the model runs."""
        infers = switches.switch("INFERENCE_MODE") is not False
        settings: list[Callable[[], Any]] = [torch.inference_mode if infers else torch.no_grad]
        if switches.switch("DISABLE_OPTIMIZED_EXECUTION"):
            settings.append(partial(torch.jit.optimized_execution, False))  # type: ignore[attr-defined]
        if switches.switch("DISABLE_CUDNN"):
            settings.append(partial(torch.backends.cudnn.flags, enabled=False))
        if self._stream is not None:
            settings.append(partial(torch.cuda.stream, self._stream))
        return settings

    @contextlib.contextmanager
    def _several_settings(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for setting in self._settings:
                stack.enter_context(setting())
            yield

    def _enter_thread(self) -> None:
        """Once, in the thread that the instance runs in: torch counts threads by thread."""
        assert self._num_threads is not None
        torch.set_num_threads(self._num_threads)
        self._num_threads = None

    def _to_torch(self, tensor: Tensor) -> Any:
        """A list of str for BYTES. A copy, unless the model is known to leave its inputs alone."""
        if tensor.datatype is DataType.BYTES:
            return [text_of(element, tensor.name) for element in tensor.numpy().reshape(-1)]
        dtype = TORCH_BY_DATATYPE[tensor.datatype]
        if isinstance(tensor.data, DeviceData) and hasattr(tensor.data, "pointer"):
            on_device = torch.as_tensor(CudaArray(tensor), device=tensor.data.device)
            return on_device.view(dtype).to(self.device or tensor.data.device)
        array = tensor.numpy()
        assert self._program is not None
        if self.device.startswith("cuda"):
            return torch.from_numpy(writable_view(array)).view(dtype).to(self.device, non_blocking=True)
        shared = torch.from_numpy(writable_view(array)).view(dtype)
        return shared.clone() if self._program.may_write_inputs else shared

    def _to_tensors(self, leaves: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Tensor]:
        borrowed = {value.untyped_storage().data_ptr() for value in values.values() if torch.is_tensor(value)}
        assert self._program is not None, "a bug: the instance is closed"
        is_pure = not self._program.may_write_inputs
        leaves = {
            name: own_on_device(leaf, borrowed, is_pure) if name in self.kept_outputs else to_host(leaf, borrowed)
            for name, leaf in leaves.items()
        }
        if self._stream is not None:
            self._stream.synchronize()
        return {name: self._tensor(name, leaf) for name, leaf in leaves.items()}

    def _tensor(self, name: str, leaf: Any) -> Tensor:
        expected = self._datatype_by_output[name]
        if isinstance(leaf, list | str):
            texts = np.array([leaf] if isinstance(leaf, str) else leaf, dtype=object)
            shape = (len(texts), 1) if self._has_batch_axis else (len(texts),)
            found, result = DataType.BYTES, Tensor.from_numpy(name, texts.reshape(shape))
        else:
            found = DATATYPE_BY_TORCH.get(leaf.dtype, DataType.BYTES)
            result = tensor_of(name, leaf, found)
        if found is not expected:
            raise Internal(
                f"configuration specified datatype {expected.config_name} for output '{name}' of model "
                f"'{self._model_name}', the model returned {found.config_name}"
            )
        return result

    def close(self) -> None:
        self._program = None


def is_leaf(value: Any) -> bool:
    """A tensor, a string or a list of strings."""
    return torch.is_tensor(value) or isinstance(value, str) or (bool(value) and is_strings(value))


def is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(element, str) for element in value)


def text_of(element: bytes, name: str) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as problem:
        raise InvalidArgument(f"an element of input '{name}' is not UTF-8, which PyTorch needs: {problem}") from None


def to_host(leaf: Any, borrowed: set[int]) -> Any:
    """In host memory, contiguous, and not the memory of an input, which is not ours to keep."""
    if not torch.is_tensor(leaf):
        return leaf
    host = leaf.detach().to("cpu").contiguous()
    return host.clone() if host.untyped_storage().data_ptr() in borrowed else host


def own_on_device(leaf: Any, borrowed: set[int], is_pure: bool) -> Any:
    """Where it is, and neither the memory of an input nor what a model that isn't pure may change in its next run."""
    if not torch.is_tensor(leaf):
        return leaf
    kept = leaf.detach().contiguous()
    return kept if is_pure and kept.untyped_storage().data_ptr() not in borrowed else kept.clone()


def tensor_of(name: str, leaf: Any, datatype: DataType) -> Tensor:
    if leaf.device.type != "cpu":
        return Tensor(name, datatype, tuple(leaf.shape), TorchDeviceData(leaf))
    host = leaf.view(torch.uint16) if datatype is DataType.BF16 else leaf
    return Tensor.from_numpy(name, host.numpy(), datatype)


class TorchDeviceData(DeviceData):
    """An output that stayed on the device."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.nbytes = tensor.nbytes
        self.device = str(tensor.device)
        self.pointer = tensor.data_ptr()

    def to_host(self) -> memoryview:
        return memoryview(self.flat_bytes().cpu().numpy().data)

    def flat_bytes(self) -> Any:
        return self.tensor.reshape(-1).view(torch.uint8)

    def joined(self, parts: Sequence[memoryview | DeviceData]) -> DeviceData | None:
        pieces = [bytes_on_device(part, self.device) for part in parts]
        if any(piece is None for piece in pieces):
            return None
        whole = torch.cat(pieces)
        if self.tensor.is_cuda:
            torch.cuda.current_stream(self.tensor.device).synchronize()  # other streams read it next
        return TorchDeviceData(whole)


def bytes_on_device(data: memoryview | DeviceData, device: str) -> Any:
    """The bytes of another model's output on this device, or of a range of one; None if they are elsewhere."""
    if isinstance(data, TorchDeviceData):
        return data.flat_bytes() if data.device == device else None
    if isinstance(data, DevicePart):
        whole = bytes_on_device(data.whole, device)
        return None if whole is None else whole[data.offset : data.offset + data.nbytes]
    return None


class CudaArray:
    """Device memory that another backend or a client owns, as bytes for torch to view."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        code = tensor.datatype.numpy.str
        self.__cuda_array_interface__ = {
            "data": (tensor.data.pointer, False),  # type: ignore[union-attr]  # checked by the caller
            "shape": tensor.shape,
            "typestr": code,
            "version": 3,
        }


class _HostMemory:
    def __init__(self, array: Any) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def writable_view(array: Any) -> Any:
    """torch warns of read-only arrays. Who gets this view must not write: see `may_write_inputs`."""
    if array.size == 0:
        return array.copy()
    return array if array.flags.writeable else np.asarray(_HostMemory(array))
