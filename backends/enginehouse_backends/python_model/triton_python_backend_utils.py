"""The module that model.py imports under this name: Triton's interface, in one place to look it up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from enginehouse.errors import EnginehouseError
from enginehouse.types import Array, decode_bytes_elements, encode_bytes_elements
from enginehouse_backends.python_model.context import running
from enginehouse_backends.python_model.errors import TritonError, TritonModelException
from enginehouse_backends.python_model.observing import Logger, Metric, MetricFamily
from enginehouse_backends.python_model.request import (
    TRITONSERVER_MEMORY_CPU,
    TRITONSERVER_MEMORY_CPU_PINNED,
    TRITONSERVER_MEMORY_GPU,
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_END,
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_START,
    TRITONSERVER_REQUEST_RELEASE_ALL,
    TRITONSERVER_REQUEST_RELEASE_RESCHEDULE,
    InferenceRequest,
    InferenceTrace,
    PreferredMemory,
    ResponseIterator,
)
from enginehouse_backends.python_model.response import (
    TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    InferenceResponse,
    InferenceResponseSender,
)
from enginehouse_backends.python_model.tensor import Tensor, numpy_to_triton_type, triton_to_numpy_type

__all__ = [
    "TRITONSERVER_MEMORY_CPU", "TRITONSERVER_MEMORY_CPU_PINNED", "TRITONSERVER_MEMORY_GPU",
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_END", "TRITONSERVER_REQUEST_FLAG_SEQUENCE_START",
    "TRITONSERVER_REQUEST_RELEASE_ALL", "TRITONSERVER_REQUEST_RELEASE_RESCHEDULE",
    "TRITONSERVER_RESPONSE_COMPLETE_FINAL", "TRITON_STRING_TO_NUMPY", "InferenceRequest", "InferenceResponse",
    "InferenceResponseSender", "InferenceTrace", "Logger", "Metric", "MetricFamily", "ModelConfig",
    "PreferredMemory", "ResponseIterator", "Tensor", "TritonError", "TritonModelException",
    "deserialize_bytes_tensor", "get_input_config_by_name", "get_input_tensor_by_name", "get_model_dir",
    "get_output_config_by_name", "get_output_tensor_by_name", "is_model_ready", "load_model",
    "numpy_to_triton_type", "serialize_byte_tensor", "triton_string_to_numpy", "triton_to_numpy_type",
    "unload_model", "using_decoupled_model_transaction_policy",
]  # fmt: skip

TRITON_STRING_TO_NUMPY: Mapping[str, Any] = {
    "TYPE_BOOL": bool,
    "TYPE_UINT8": np.uint8,
    "TYPE_UINT16": np.uint16,
    "TYPE_UINT32": np.uint32,
    "TYPE_UINT64": np.uint64,
    "TYPE_INT8": np.int8,
    "TYPE_INT16": np.int16,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    "TYPE_STRING": np.object_,
}


# --- tensors and configs by name


def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> Tensor | None:
    for tensor in inference_request.inputs():
        if tensor._name == name:
            return tensor
    return None


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> Tensor | None:
    for tensor in inference_response.output_tensors():
        if tensor._name == name:
            return tensor
    return None


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> Any:
    return next((spec for spec in model_config.get("input", ()) if spec["name"] == name), None)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> Any:
    return next((spec for spec in model_config.get("output", ()) if spec["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    policy = model_config.get("model_transaction_policy", {})
    return bool(policy.get("decoupled", False))


def triton_string_to_numpy(triton_type_string: str) -> Any:
    return TRITON_STRING_TO_NUMPY[triton_type_string]


def serialize_byte_tensor(input_tensor: Array) -> bytes | tuple[()] | None:
    """Strings in wire layout; nothing for an empty tensor, None for other types."""
    if input_tensor.size == 0:
        return ()
    return encode_bytes_elements(input_tensor) if input_tensor.dtype.kind in "OS" else None


def deserialize_bytes_tensor(encoded_tensor: Any) -> Array:
    return decode_bytes_elements(memoryview(encoded_tensor))


# --- the server


def get_model_dir() -> str:
    """The folder of this version."""
    return running.directory


def load_model(model_name: str, config: str = "", files: Mapping[str, bytes] | None = None) -> None:
    """Blocks until the model is ready. Raises TritonModelException."""
    _control("load_model", model_name, config or None, dict(files or {}))


def unload_model(model_name: str, unload_dependents: bool = False) -> None:
    _control("unload_model", model_name, unload_dependents)


def is_model_ready(model_name: str, model_version: str | int = "") -> bool:
    return bool(_control("is_model_ready", model_name, str(model_version)))


def _control(method: str, *arguments: Any) -> Any:
    if running.services is None:
        raise TritonModelException("This model runs without a server: there are no other models.")
    try:
        return getattr(running.services, method)(*arguments)
    except EnginehouseError as problem:
        raise TritonModelException(str(problem)) from None


# --- auto_complete_config


class ModelConfig:
    """The config that `auto_complete_config` completes. Raises ValueError where it contradicts what is set."""

    def __init__(self, model_config: str) -> None:
        self._model_config: dict[str, Any] = json.loads(model_config)

    def as_dict(self) -> dict[str, Any]:
        return self._model_config

    def set_max_batch_size(self, max_batch_size: int) -> None:
        configured = self._model_config["max_batch_size"]
        if configured > max_batch_size:
            raise ValueError(
                f"configuration specified max_batch_size {configured}, but in auto-complete-config function "
                f"for model '{self._name}' specified max_batch_size {max_batch_size}"
            )
        self._model_config["max_batch_size"] = max_batch_size

    def set_dynamic_batching(self) -> None:
        for scheduler in ("sequence_batching", "ensemble_scheduling"):
            if scheduler in self._model_config:
                raise ValueError(
                    f"Configuration specified scheduling_choice as '{scheduler}', but auto-complete-config "
                    f"function for model '{self._name}' tries to set scheduling_choice as 'dynamic_batching'"
                )
        self._model_config.setdefault("dynamic_batching", {})

    def set_model_transaction_policy(self, transaction_policy_dict: Mapping[str, Any]) -> None:
        if any(key != "decoupled" for key in transaction_policy_dict):
            raise ValueError(
                f"model transaction property in auto-complete-config function for model '{self._name}' "
                f"contains property other than 'decoupled'."
            )
        policy = self._model_config.setdefault("model_transaction_policy", {})
        wanted = transaction_policy_dict["decoupled"]
        if policy.setdefault("decoupled", wanted) != wanted:
            raise ValueError(
                f"trying to change decoupled property in auto-complete-config for model '{self._name}', which "
                f"is already set to '{policy['decoupled']}'."
            )

    def add_input(self, input: Mapping[str, Any]) -> None:
        allowed = ("name", "data_type", "dims", "optional", "allow_ragged_batch")
        self._add("input", input, allowed, "'name', 'data_type', 'dims', 'optional' and 'allow_ragged_batch'")

    def add_output(self, output: Mapping[str, Any]) -> None:
        self._add("output", output, ("name", "data_type", "dims"), "'name', 'data_type' and 'dims'")

    @property
    def _name(self) -> str:
        return str(self._model_config["name"])

    def _add(self, kind: str, spec: Mapping[str, Any], allowed: tuple[str, ...], listed: str) -> None:
        where = f"in auto-complete-config function for model '{self._name}'"
        if any(key not in allowed for key in spec):
            raise ValueError(f"{kind} '{spec.get('name')}' {where} contains property other than {listed}.")
        if "name" not in spec:
            raise ValueError(f"{kind} {where} is missing 'name' property.")
        for key in ("data_type", "dims"):
            if key not in spec:
                raise ValueError(f"{kind} '{spec['name']}' {where} is missing '{key}' property.")
        for known in self._model_config[kind]:
            if known["name"] == spec["name"]:
                self._merge(kind, known, spec)
                return
        self._model_config[kind].append(dict(spec))

    def _merge(self, kind: str, known: dict[str, Any], spec: Mapping[str, Any]) -> None:
        if known.get("data_type", "TYPE_INVALID") not in ("TYPE_INVALID", spec["data_type"]):
            raise ValueError(
                f"unable to load model '{self._name}', configuration expects datatype {known['data_type']} for "
                f"{kind} '{spec['name']}', model provides {spec['data_type']}"
            )
        if known.get("dims") and known["dims"] != spec["dims"]:
            raise ValueError(
                f"model '{self._name}', tensor '{spec['name']}': the model expects dims {spec['dims']} but the "
                f"model configuration specifies dims {known['dims']}"
            )
        for key in ("optional", "allow_ragged_batch"):
            if key in spec and known.get(key) and known[key] != spec[key]:
                raise ValueError(
                    f"model '{self._name}', tensor '{spec['name']}': the model expects {key} {spec[key]} but "
                    f"the model configuration specifies {key} {known[key]}"
                )
        known.update(spec)
