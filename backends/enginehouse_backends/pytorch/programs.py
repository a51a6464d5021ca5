"""The forms in which PyTorch models come, each loaded into something that takes arguments by name.

TorchScript (`model.pt`), `torch.export` and AOTInductor packages (`model.pt2`), and a class in `model.py`
with its weights beside it. Pickled modules are refused: loading one runs whatever code is in it.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from enginehouse.errors import InvalidArgument, NotFound
from enginehouse.types import DataType, TensorSpec
from enginehouse_backends.pytorch.naming import flatten
from enginehouse_backends.signature import Signature

DATATYPE_BY_TORCH = {
    torch.bool: DataType.BOOL, torch.uint8: DataType.UINT8, torch.uint16: DataType.UINT16,
    torch.uint32: DataType.UINT32, torch.uint64: DataType.UINT64, torch.int8: DataType.INT8,
    torch.int16: DataType.INT16, torch.int32: DataType.INT32, torch.int64: DataType.INT64,
    torch.float16: DataType.FP16, torch.float32: DataType.FP32, torch.float64: DataType.FP64,
    torch.bfloat16: DataType.BF16,
}  # fmt: skip
WEIGHT_FILENAMES = ("model.safetensors", "model.pt", "model.pth", "model.bin")


class Program(ABC):
    """`arguments` are in the order in which the model takes them; empty if the model takes one dict."""

    arguments: Sequence[str] = ()
    takes_dict = False
    signature: Signature | None = None
    """What the file says of its tensors, where it does."""
    may_write_inputs = True
    """False if the file proves that the model leaves its inputs as they are."""

    @abstractmethod
    def call(self, values: Mapping[str, Any]) -> Any:
        """`values` by argument."""


def load_program(path: Path, device: str, class_name: str = "") -> Program:
    """`device` "" leaves the model where it puts itself. Raises InvalidArgument that names the file."""
    try:
        if path.suffix == ".py":
            return ClassProgram(path, device, class_name)
        if path.suffix == ".pt2":
            return AotInductorProgram(path, device) if is_aot_inductor(path) else ExportedProgram(path, device)
        if not is_torchscript(path):
            raise InvalidArgument(
                f"{path} is neither TorchScript nor beside a model.py that defines its class; a pickled module is "
                f"not loaded, because unpickling runs code: save a state dict and put the class into model.py"
            )
        return TorchScriptProgram(path, device)
    except (InvalidArgument, NotFound):
        raise
    except Exception as problem:
        raise InvalidArgument(f"PyTorch can't load {path}: {first_line(problem)}") from problem


def first_line(problem: Exception) -> str:
    lines = [line for line in str(problem).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(problem).__name__


def zip_names(path: Path) -> list[str]:
    """Raises InvalidArgument for a file that is no zip: every form that torch saves is one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as problem:
        raise InvalidArgument(f"{path} is not a PyTorch file: {problem}") from None


def is_torchscript(path: Path) -> bool:
    names = zip_names(path)
    return "constants.pkl" in names or any(name.startswith("code/") for name in names)


def is_aot_inductor(path: Path) -> bool:
    return any(name.startswith("data/aotinductor/") for name in zip_names(path))


# --- TorchScript ---------------------------------------------------------------------------------------


class TorchScriptProgram(Program):
    """The GIL is free while it runs."""

    def __init__(self, path: Path, device: str) -> None:
        self._module = torch.jit.load(str(path), map_location=device or None)  # type: ignore[no-untyped-call]
        self._module.eval()
        arguments = self._module.forward.schema.arguments[1:]
        self.takes_dict = len(arguments) == 1 and isinstance(arguments[0].type, torch.DictType)
        self.arguments = [] if self.takes_dict else [argument.name for argument in arguments]

    def call(self, values: Mapping[str, Any]) -> Any:
        return self._module(dict(values)) if self.takes_dict else self._module(**values)


# --- torch.export --------------------------------------------------------------------------------------


class ExportedProgram(Program):
    def __init__(self, path: Path, device: str) -> None:
        exported = torch.export.load(path)
        if device and device != "cpu":
            from torch.export.passes import move_to_device_pass

            exported = move_to_device_pass(exported, device)
        self._module = exported.module()
        self._in_spec = exported.call_spec.in_spec
        self.arguments = exported_arguments(exported)
        self.signature = exported_signature(path, exported, self.arguments)
        self.may_write_inputs = bool(exported.graph_signature.user_inputs_to_mutate)

    def call(self, values: Mapping[str, Any]) -> Any:
        leaves = [values[name] for name in self.arguments]
        args, kwargs = pytree.tree_unflatten(leaves, self._in_spec)
        return self._module(*args, **kwargs)


def read_exported_signature(path: Path) -> Signature:
    """What `torch.export` wrote into the file; loads it, which is cheap beside running it."""
    exported = torch.export.load(path)
    return exported_signature(path, exported, exported_arguments(exported))


def exported_arguments(exported: Any) -> list[str]:
    called = exported.module_call_graph[0].signature
    names = (called.forward_arg_names if called is not None else None) or []
    return leaf_names(exported.call_spec.in_spec, list(exported.graph_signature.user_inputs), names)


def leaf_names(in_spec: Any, placeholders: Sequence[str], argument_names: Sequence[str] = ()) -> list[str]:
    """Argument names and keys of dicts where they tell the inputs apart, else the graph's own names."""
    args, kwargs = pytree.tree_unflatten(list(placeholders), in_spec)
    by_name = dict(zip(argument_names, args, strict=False)) if len(argument_names) >= len(args) else {}
    tree = ({**by_name, **kwargs},) if by_name else (*args, kwargs)
    keys = [key or name for key, name in flatten(tree, lambda leaf: isinstance(leaf, str))]
    return keys if len(set(keys)) == len(keys) else list(placeholders)


def exported_signature(path: Path, exported: Any, arguments: Sequence[str]) -> Signature:
    nodes = {node.name: node for node in exported.graph.nodes}
    ins = [nodes[name].meta["val"] for name in exported.graph_signature.user_inputs]
    outs = [nodes[name].meta["val"] for name in exported.graph_signature.user_outputs if name in nodes]
    spec = exported.call_spec.out_spec
    keys = [key for key, _ in flatten(pytree.tree_unflatten(outs, spec), lambda leaf: isinstance(leaf, torch.Tensor))]
    names = [key or f"OUTPUT__{position}" for position, key in enumerate(keys)]
    return Signature(
        file=str(path),
        inputs=tuple(tensor_spec(name, value) for name, value in zip(arguments, ins, strict=True)),
        outputs=tuple(tensor_spec(name, value) for name, value in zip(names, outs, strict=True)),
        batches=share_first_dimension([*ins, *outs]),
    )


def tensor_spec(name: str, value: Any) -> TensorSpec:
    dims = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return TensorSpec(name, DATATYPE_BY_TORCH[value.dtype], dims)


def share_first_dimension(values: Sequence[Any]) -> bool:
    """True if all have the same free size there: then it is the batch."""
    firsts = {str(value.shape[0]) if len(value.shape) else "none" for value in values}
    return len(firsts) == 1 and not isinstance(values[0].shape[0], int) if values and values[0].shape else False


# --- AOTInductor ---------------------------------------------------------------------------------------


class AotInductorProgram(Program):
    """Compiled ahead of time for one kind of device; the GIL is free while it runs."""

    may_write_inputs = False

    def __init__(self, path: Path, device: str) -> None:
        kind, _, index = device.partition(":")
        self._runner = torch._inductor.aoti_load_package(str(path), device_index=int(index) if index else -1)
        built_for = self._runner.get_metadata().get("AOTI_DEVICE_KEY", kind)
        if kind and built_for != kind:
            raise InvalidArgument(f"{path} was compiled for {built_for}, it can't run on {device}")
        in_spec, _ = (pytree.treespec_loads(text) for text in self._runner.loader.get_call_spec())
        self._in_spec = in_spec
        self.arguments = leaf_names(in_spec, [f"INPUT__{position}" for position in range(in_spec.num_leaves)])

    def call(self, values: Mapping[str, Any]) -> Any:
        leaves = [values[name] for name in self.arguments]
        args, kwargs = pytree.tree_unflatten(leaves, self._in_spec)
        return self._runner(*args, **kwargs)


# --- a class and its weights ---------------------------------------------------------------------------


class ClassProgram(Program):
    """model.py defines one nn.Module; its state dict lies beside it."""

    def __init__(self, path: Path, device: str, class_name: str = "") -> None:
        self.module = module_class(path, class_name)()
        weights = [path.with_name(name) for name in WEIGHT_FILENAMES if path.with_name(name).is_file()]
        if weights:
            self.module.load_state_dict(load_state_dict(weights[0], device))
        if device:
            self.module.to(device)
        self.module.eval()
        parameters = inspect.signature(self.module.forward).parameters.values()
        self.arguments = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]

    def compile(self, options_json: str) -> None:
        """`torch.compile` with the options of the parameter TORCH_COMPILE_OPTIONAL_PARAMETERS."""
        options = json.loads(options_json or "{}")
        if not isinstance(options, dict) or "model" in options:
            raise InvalidArgument("TORCH_COMPILE_OPTIONAL_PARAMETERS must be a JSON object without the key 'model'")
        self.module = torch.compile(self.module, **options)

    def call(self, values: Mapping[str, Any]) -> Any:
        return self.module(**values)


def module_class(path: Path, class_name: str) -> Any:
    """The nn.Module that the file itself defines. Raises InvalidArgument if it isn't one."""
    spec = importlib.util.spec_from_file_location(f"enginehouse_model_{abs(hash(path))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.nn.Module) and value.__module__ == module.__name__
    }
    if class_name in classes:
        return classes[class_name]
    if class_name or not classes:
        raise InvalidArgument(f"{path} defines no torch.nn.Module{f' named {class_name!r}' if class_name else ''}")
    outer = [c for name, c in classes.items() if not any(_makes(other, name) for other in classes.values())]
    if len(outer) != 1:
        raise InvalidArgument(
            f"{path} defines several torch.nn.Modules: {', '.join(classes)}; name the model's in the parameter "
            f"MODEL_CLASS_NAME"
        )
    return outer[0]


def _makes(maker: type, name: str) -> bool:
    """True if the class makes objects of the class `name`: then that one is a part, not the model."""
    return maker.__name__ != name and name in maker.__init__.__code__.co_names  # type: ignore[misc]


def load_state_dict(path: Path, device: str) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path, device=device or "cpu")
    if is_torchscript(path):
        scripted = torch.jit.load(str(path), map_location=device or None)  # type: ignore[no-untyped-call]
        return scripted.state_dict()
    return torch.load(path, map_location=device or None, weights_only=True)
