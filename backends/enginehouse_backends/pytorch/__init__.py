"""PyTorch models: TorchScript, `torch.export`, AOTInductor packages, and a class with its state dict.

Parameter and tensor names follow Triton's PyTorch backend. On a CPU each model has a process of its own,
because torch is heavy and a model's Python code would hold the server's GIL.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from enginehouse.backend import Backend, HostKind, LoadContext, MemoryNeeds, Model, Placement, TensorInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument, NotFound
from enginehouse.types import TensorSpec
from enginehouse_backends.artifacts import artifact_path, total_bytes
from enginehouse_backends.parameters import Parameters
from enginehouse_backends.pytorch.instance import TorchInstance
from enginehouse_backends.pytorch.naming import bind_inputs, indices_of
from enginehouse_backends.pytorch.programs import (
    WEIGHT_FILENAMES,
    ClassProgram,
    Program,
    is_aot_inductor,
    is_torchscript,
    load_program,
    read_exported_signature,
)
from enginehouse_backends.signature import DEFAULT_MAX_BATCH_SIZE, Signature, check_config, complete_config

FILENAMES = ("model.py", "model.pt", "model.pt2")
COMPILE_OPTIONS = "TORCH_COMPILE_OPTIONAL_PARAMETERS"
JIT_SWITCHES = {
    "ENABLE_JIT_EXECUTOR": "_jit_set_profiling_executor",
    "ENABLE_JIT_PROFILING": "_jit_set_profiling_mode",
    "ENABLE_TENSOR_FUSER": "_jit_set_texpr_fuser_enabled",
    "ENABLE_NVFUSER": "_jit_set_nvfuser_enabled",
}


class PyTorchBackend(Backend):
    name = "pytorch"
    default_filename = "model.pt"

    def host_kind(self, config: ModelConfig) -> HostKind:
        on_gpu = any(group.kind == group.KIND_GPU for group in config.instance_group)
        return HostKind.DEVICE if on_gpu else HostKind.PROCESS

    def complete_config(self, context: LoadContext) -> ModelConfig:
        """Only `torch.export` writes shapes into its files; the other forms need a config."""
        path = program_path(context)
        if path.suffix != ".pt2" or is_aot_inductor(path):
            return context.config
        default_size = int(context.backend_options.get("default-max-batch-size", DEFAULT_MAX_BATCH_SIZE))
        signature = in_config_names(context.config, read_exported_signature(path))
        return complete_config(context.config, signature, default_size)

    def memory_needs(self, context: LoadContext) -> MemoryNeeds:
        path = program_path(context)
        weights = [path.with_name(name) for name in WEIGHT_FILENAMES] if path.suffix == ".py" else [path]
        return MemoryNeeds(weights_bytes=total_bytes(*weights))

    def load(self, context: LoadContext) -> Model:
        return PyTorchModel(context)


def program_path(context: LoadContext, compute_capability: str = "") -> Path:
    """The file that holds the program: model.py, where the artifact is the weights of its class."""
    source = context.version_directory / "model.py"
    if not source.is_file():
        return artifact_path(context, *FILENAMES, compute_capability=compute_capability)
    try:
        path = artifact_path(context, *FILENAMES, compute_capability=compute_capability)
    except NotFound:
        return source
    holds_program = path.suffix in (".py", ".pt2") or (path.suffix == ".pt" and is_torchscript(path))
    return path if holds_program else source


def in_config_names(config: ModelConfig, signature: Signature) -> Signature:
    """The signature with the config's names for its tensors, where it goes by `INPUT__0` or by order."""
    names = [entry.name for entry in config.input]
    arguments = [spec.name for spec in signature.inputs]
    name_by_argument = {a: n for n, a in bind_inputs(config.name, signature.file, names, arguments).items()}
    outputs = [entry.name for entry in config.output]
    results = [spec.name for spec in signature.outputs]
    name_by_result: dict[str, str] = {}
    if not all(name in results for name in outputs):
        positions = indices_of(outputs) or list(range(len(outputs)))
        name_by_result = {results[p]: n for n, p in zip(outputs, positions, strict=True) if p < len(results)}

    def renamed(spec: TensorSpec, names_by_own: dict[str, str]) -> TensorSpec:
        return TensorSpec(names_by_own.get(spec.name, spec.name), spec.datatype, spec.dims, spec.optional)

    return Signature(
        signature.file,
        tuple(renamed(spec, name_by_argument) for spec in signature.inputs),
        tuple(renamed(spec, name_by_result) for spec in signature.outputs),
        signature.batches,
    )


class PyTorchModel(Model):
    """Loads the artifact once an instance, or once a device with ENABLE_WEIGHT_SHARING."""

    def __init__(self, context: LoadContext) -> None:
        self.context = context
        self.path = program_path(context)
        self.parameters = Parameters(context.config)
        self._lock = threading.Lock()  # guards _spare and _program_by_device while instances are made
        self._program_by_device: dict[str, Program] = {}
        self._spare: Program | None = self._load("cpu") if self._wants_cpu() else None
        self._set_process_switches()

    def _wants_cpu(self) -> bool:
        groups = self.context.config.instance_group
        return not groups or any(group.kind in (group.KIND_AUTO, group.KIND_CPU) for group in groups)

    def create_instance(self, placement: Placement) -> TensorInstance:
        device = "" if placement.device == "model" else placement.device
        with self._lock:
            program = self._program_for(device)
        return TorchInstance(self.context, program, device)

    def _program_for(self, device: str) -> Program:
        """The first CPU instance takes what was loaded to check the file."""
        if self.parameters.switch("ENABLE_WEIGHT_SHARING"):
            if device not in self._program_by_device:
                self._program_by_device[device] = self._take_spare(device) or self._load(device)
            return self._program_by_device[device]
        return self._take_spare(device) or self._load(device)

    def _take_spare(self, device: str) -> Program | None:
        if device != "cpu" or self._spare is None:
            return None
        spare, self._spare = self._spare, None
        return spare

    def _load(self, device: str) -> Program:
        path = self.path
        if device.startswith("cuda"):
            major, minor = torch.cuda.get_device_capability(device)
            path = program_path(self.context, f"{major}.{minor}")
        program = load_program(path, device, self.parameters.values.get("MODEL_CLASS_NAME", ""))
        if isinstance(program, ClassProgram) and COMPILE_OPTIONS in self.parameters.values:
            program.compile(self.parameters.values[COMPILE_OPTIONS])
        check(self.context.config, path, program)
        return program

    def _set_process_switches(self) -> None:
        """TorchScript's executor has only switches for the whole process."""
        for key, function in JIT_SWITCHES.items():
            value = self.parameters.switch(key)
            if value is not None and hasattr(torch._C, function):
                getattr(torch._C, function)(value)
        num_threads = self.parameters.number("INTER_OP_THREAD_COUNT")
        if num_threads and torch.get_num_interop_threads() != num_threads:
            torch.set_num_interop_threads(num_threads)

    def close(self) -> None:
        self._program_by_device.clear()
        self._spare = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


def check(config: ModelConfig, path: Path, program: Program) -> None:
    """Raises InvalidArgument if the config doesn't say enough or contradicts the file."""
    if program.signature is not None:
        check_config(config, in_config_names(config, program.signature))
        return
    for kind, entries in (("input", config.input), ("output", config.output)):
        if not entries:
            raise InvalidArgument(
                f"model '{config.name}': must specify '{kind}' in the config, because {path} doesn't say data types "
                f"and shapes (a file of torch.export would)"
            )
    if not program.takes_dict:
        bind_inputs(config.name, str(path), [entry.name for entry in config.input], program.arguments)
