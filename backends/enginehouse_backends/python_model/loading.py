"""Finds model.py, imports it as Triton's stub does, and carries what its `auto_complete_config` says back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from enginehouse.backend import LoadContext
from enginehouse.config.json_form import to_json
from enginehouse.config.schema import DataType, ModelConfig
from enginehouse.errors import Internal, NotFound
from enginehouse_backends.python_model import triton_python_backend_utils
from enginehouse_backends.python_model.context import running
from enginehouse_backends.python_model.errors import describe

BACKEND_MODEL_OPTION = "python-based-backend"
INTERFACE = "triton_python_backend_utils"


def set_running(context: LoadContext) -> None:
    """Tells the interface which model this process runs."""
    running.name = context.name
    running.directory = str(context.version_directory)
    running.decoupled = context.config.model_transaction_policy.decoupled
    running.output_names = [output.name for output in context.config.output]
    running.services = context.services


def model_file(context: LoadContext) -> Path:
    """Raises NotFound if it isn't there."""
    for_all = context.backend_options.get(BACKEND_MODEL_OPTION)
    if for_all:
        return Path(for_all)
    path = context.version_directory / (context.config.default_model_filename or "model.py")
    if not path.is_file():
        raise NotFound(f"Python model file not found in '{path}'")
    return path


def import_model_class(context: LoadContext) -> Any:
    """TritonPythonModel of the model's file. Raises Internal with the exception as Triton words it."""
    path = model_file(context)
    sys.modules[INTERFACE] = triton_python_backend_utils
    sys.modules.setdefault("c_python_backend_utils", triton_python_backend_utils)
    folder = path.parent
    # The version's folder is a namespace package named after its number; "1.model" is its module.
    for entry in (str(folder), str(folder.parent)):
        if entry not in sys.path:
            sys.path.append(entry)
    name = f"{folder.name}.{path.stem}"
    try:
        module = __import__(name, fromlist=["TritonPythonModel"])
        return module.TritonPythonModel
    except AttributeError as problem:
        if problem.__traceback__ is not None and problem.__traceback__.tb_next is None:
            raise Internal(f"AttributeError: module '{name}' has no attribute 'TritonPythonModel'") from None
        raise Internal(describe(problem)) from problem
    except Exception as problem:
        raise Internal(describe(problem)) from problem


def complete(context: LoadContext) -> ModelConfig:
    """The config with what the model's `auto_complete_config` adds. Raises Internal."""
    set_running(context)
    model_class = import_model_class(context)
    if not hasattr(model_class, "auto_complete_config"):
        return context.config
    given = triton_python_backend_utils.ModelConfig(to_json(context.config))
    try:
        completed = model_class.auto_complete_config(given)
    except Exception as problem:
        raise Internal(describe(problem)) from problem
    if not isinstance(completed, triton_python_backend_utils.ModelConfig):
        raise Internal(
            f"auto_complete_config function in model '{context.name}' must return a valid pb.ModelConfig object."
        )
    return _merged(context.config, completed.as_dict())


def _merged(config: ModelConfig, said: dict[str, Any]) -> ModelConfig:
    """What a model may set: max_batch_size, inputs, outputs, dynamic batching, transaction policy."""
    merged = ModelConfig()
    merged.CopyFrom(config)
    merged.max_batch_size = int(said["max_batch_size"])
    for spec in said["input"]:
        known = _tensor_of(merged.input, spec)
        known.optional = bool(spec.get("optional", False))
        known.allow_ragged_batch = bool(spec.get("allow_ragged_batch", False))
    for spec in said["output"]:
        _tensor_of(merged.output, spec)
    if "dynamic_batching" in said and not merged.HasField("dynamic_batching"):
        merged.dynamic_batching.SetInParent()
    if "model_transaction_policy" in said:
        merged.model_transaction_policy.decoupled = bool(said["model_transaction_policy"].get("decoupled"))
    return merged


def _tensor_of(tensors: Any, spec: dict[str, Any]) -> Any:
    """The input or output of that name, added if need be, with type and dims set."""
    tensor = next((known for known in tensors if known.name == spec["name"]), None) or tensors.add()
    tensor.name = spec["name"]
    tensor.data_type = DataType.Value(spec["data_type"])
    del tensor.dims[:]
    tensor.dims.extend(int(dim) for dim in spec["dims"])
    return tensor
