"""TensorRT plans: dynamic shapes, optimization profiles, shape tensors, CUDA graphs, streams.

All instances of a model on one GPU share its plan; each has execution contexts, a stream and buffers of its
own. torch does the memory and the streams.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

from enginehouse.backend import Backend, HostKind, LoadContext, MemoryNeeds, Model, Placement, TensorInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument, NotFound
from enginehouse_backends.artifacts import artifact_path, total_bytes
from enginehouse_backends.signature import check_config, complete_config
from enginehouse_backends.tensorrt_engine.engine import Engine
from enginehouse_backends.tensorrt_engine.instance import TensorRTInstance, pinned, priority_of
from enginehouse_backends.tensorrt_engine.library import load_library, require_gpu
from enginehouse_backends.tensorrt_engine.memory import CudaMemory, Memory
from enginehouse_backends.tensorrt_engine.profiles import profile_numbers


class TensorRTBackend(Backend):
    name = "tensorrt"
    default_filename = "model.plan"

    def __init__(self) -> None:
        self.library = load_library()

    def host_kind(self, config: ModelConfig) -> HostKind:
        return HostKind.DEVICE

    def complete_config(self, context: LoadContext) -> ModelConfig:
        """The largest batch is that of the plan's profiles."""
        return complete_from(load_engine(self.library, context, "cuda:0"), context.config)

    def memory_needs(self, context: LoadContext) -> MemoryNeeds:
        return MemoryNeeds(weights_bytes=total_bytes(artifact_path(context, self.default_filename)))

    def load(self, context: LoadContext) -> Model:
        return TensorRTModel(self.library, context)


def complete_from(engine: Engine, config: ModelConfig) -> ModelConfig:
    lists_inputs, lists_outputs = bool(config.input), bool(config.output)
    completed = complete_config(config, engine.signature, engine.max_rows)
    for tensor in engine.tensors:
        if tensor.is_on_host and not (lists_inputs if tensor.is_input else lists_outputs):
            entries = completed.input if tensor.is_input else completed.output
            entries.add(
                name=tensor.name, data_type=tensor.datatype.proto, dims=tensor.dims or (1,), is_shape_tensor=True
            )
    return completed


def check_against(engine: Engine, config: ModelConfig) -> None:
    """Raises InvalidArgument for the first thing in which config and plan differ."""
    varying = ModelConfig()
    varying.CopyFrom(config)
    for entries in (varying.input, varying.output):
        for index in reversed(range(len(entries))):
            if entries[index].name in engine.shape_tensors:
                del entries[index]
    check_config(varying, engine.signature)
    if 0 < engine.max_rows < config.max_batch_size:
        raise InvalidArgument(
            f"model '{config.name}': max_batch_size is {config.max_batch_size}, the profiles of {engine.path} allow "
            f"{engine.max_rows}"
        )


def load_engine(library: Any, context: LoadContext, device: str) -> Engine:
    """Raises Unsupported on a machine without a GPU, InvalidArgument for a plan that isn't for it."""
    artifact_path(context, TensorRTBackend.default_filename)  # a missing file is said first
    require_gpu(f"model '{context.name}'")
    major, minor = torch.cuda.get_device_capability(device)
    path = artifact_path(context, TensorRTBackend.default_filename, compute_capability=f"{major}.{minor}")
    load_plugins(context)
    host_code = context.backend_options.get("version-compatible", "").lower() in ("1", "true")
    with torch.cuda.device(device):
        return Engine(library, path, runs_host_code=host_code)


def load_plugins(context: LoadContext) -> None:
    """Libraries from --backend-config=tensorrt,plugins=a.so;b.so. They register themselves."""
    for name in filter(None, context.backend_options.get("plugins", "").split(";")):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as problem:
            raise NotFound(f"backend option tensorrt,plugins: can't load {name}: {problem}") from None


class TensorRTModel(Model):
    def __init__(self, library: Any, context: LoadContext) -> None:
        self._library = library
        artifact_path(context, TensorRTBackend.default_filename)
        require_gpu(f"model '{context.name}'")
        self.context = context
        self._lock = threading.Lock()  # guards _engine_by_device while instances are made
        self._engine_by_device: dict[str, Engine] = {}

    def create_instance(self, placement: Placement) -> TensorInstance:
        device = "cuda:0" if placement.device == "model" else placement.device
        if not device.startswith("cuda"):
            raise InvalidArgument(
                f"model '{self.context.name}': TensorRT runs on GPUs only, instance {placement.name} is on {device}"
            )
        config = self.context.config
        with self._lock:
            engine = self._engine_by_device.get(device) or self._load(device)
            self._engine_by_device[device] = engine
        groups = config.instance_group
        named = list(groups[placement.group].profile) if placement.group < len(groups) else []
        numbers = profile_numbers(config.name, named, len(engine.profiles))
        return TensorRTInstance(config, engine, self._memory(device), numbers)

    def _load(self, device: str) -> Engine:
        engine = load_engine(self._library, self.context, device)
        check_against(engine, self.context.config)
        return engine

    def _memory(self, device: str) -> Memory:
        optimization = self.context.config.optimization
        return CudaMemory(
            device,
            priority_of(self.context.config),
            pins_inputs=pinned(optimization, "input_pinned_memory"),
            pins_outputs=pinned(optimization, "output_pinned_memory"),
            busy_wait=optimization.cuda.busy_wait_events,
            copies_apart=optimization.cuda.output_copy_stream,
        )

    def close(self) -> None:
        self._engine_by_device.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


__all__ = ["TensorRTBackend", "TensorRTInstance", "TensorRTModel"]
