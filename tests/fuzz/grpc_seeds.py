"""Good gRPC messages of every method, to be spoilt."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from enginehouse.config import schema
from tests.fuzz.http_seeds import SHARED_MEMORY_BYTES, SHARED_MEMORY_KEY

INFER = f"/{schema.SERVICE_NAME}/ModelInfer"
STREAM = f"/{schema.SERVICE_NAME}/ModelStreamInfer"


@dataclass(frozen=True)
class Seed:
    path: str
    make: Callable[[], Any]
    weight: float = 1


def _infer(model: str, name: str, datatype: str, shape: list[int], raw: bytes = b"", **contents: Any) -> Any:
    request = schema.ModelInferRequest(model_name=model, id="1")
    tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.outputs.add(name="OUT")
    if raw:
        request.raw_input_contents.append(raw)
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    return request


def floats_of(values: bytes, model: str = "echo") -> Any:
    return _infer(model, "IN", "FP32", [1, len(values) // 4], values)


def _floats_raw() -> Any:
    return floats_of(struct.pack("<4f", 1, 2, 3, 4))


def _floats_typed() -> Any:
    request = _infer("echo", "IN", "FP32", [2, 2], fp32_contents=[1, 2, 3, 4])
    request.outputs[0].parameters["classification"].int64_param = 2
    request.parameters["priority"].uint64_param = 1
    return request


def _floats_in_memory() -> Any:
    request = _infer("echo", "IN", "FP32", [1, 4])
    for tensor in (request.inputs[0], request.outputs[0]):
        tensor.parameters["shared_memory_region"].string_param = "fuzz"
        tensor.parameters["shared_memory_byte_size"].int64_param = 16
    return request


def _texts() -> Any:
    return _infer("echo_text", "IN", "BYTES", [2], bytes_contents=[b"one", b"two"])


def _texts_raw() -> Any:
    return _infer("echo_text", "IN", "BYTES", [2], struct.pack("<I3sI3s", 3, b"one", 3, b"two"))


def _numbers() -> Any:
    request = _infer("repeat", "IN", "INT32", [3], int_contents=[3, 1, 2])
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request


def _sequence() -> Any:
    request = _infer("running_sum", "IN", "INT32", [1, 1], int_contents=[5])
    request.parameters["sequence_id"].int64_param = 9
    request.parameters["sequence_start"].bool_param = True
    request.parameters["sequence_end"].bool_param = True
    return request


def _language() -> Any:
    request = _infer("tiny", "text_input", "BYTES", [1], bytes_contents=[b"Hi"])
    del request.outputs[:]
    request.parameters["max_tokens"].int64_param = 2
    return request


def _load() -> Any:
    request = schema.RepositoryModelLoadRequest(model_name="echo_text")
    request.parameters["config"].string_param = '{"backend":"python"}'
    return request


def _trace() -> Any:
    request = schema.TraceSettingRequest(model_name="echo")
    request.settings["trace_rate"].value.append("1000")
    return request


def _logs() -> Any:
    request = schema.LogSettingsRequest()
    request.settings["log_info"].bool_param = False
    request.settings["log_verbose_level"].uint32_param = 0
    return request


def _register() -> Any:
    return schema.SystemSharedMemoryRegisterRequest(
        name="fuzz", key=SHARED_MEMORY_KEY, byte_size=SHARED_MEMORY_BYTES
    )


def _method(name: str, make: Callable[[], Any] | None = None, weight: float = 1) -> Seed:
    return Seed(f"/{schema.SERVICE_NAME}/{name}", make or getattr(schema, f"{name}Request"), weight)


INFERENCES = (
    _floats_raw, _floats_typed, _floats_in_memory, _texts, _texts_raw, _numbers, _sequence, _language,
)  # fmt: skip
SEEDS = (
    *(Seed(path, make, 6) for make in INFERENCES for path in (INFER, STREAM)),
    _method("ServerLive"),
    _method("ServerReady"),
    _method("ModelReady", lambda: schema.ModelReadyRequest(name="echo", version="1")),
    _method("ServerMetadata"),
    _method("ModelMetadata", lambda: schema.ModelMetadataRequest(name="echo")),
    _method("ModelConfig", lambda: schema.ModelConfigRequest(name="echo", version="1")),
    _method("ModelStatistics", lambda: schema.ModelStatisticsRequest(name="echo")),
    _method("RepositoryIndex", lambda: schema.RepositoryIndexRequest(ready=True)),
    _method("RepositoryModelLoad", _load, 0.05),
    _method("RepositoryModelUnload", lambda: schema.RepositoryModelUnloadRequest(model_name="echo_text"), 0.05),
    _method("SystemSharedMemoryStatus"),
    _method("SystemSharedMemoryRegister", _register, 2),
    _method("SystemSharedMemoryUnregister", lambda: schema.SystemSharedMemoryUnregisterRequest(name="fuzz")),
    _method("CudaSharedMemoryStatus"),
    _method("CudaSharedMemoryRegister", lambda: schema.CudaSharedMemoryRegisterRequest(
        name="fuzz", raw_handle=bytes(64), byte_size=64)),
    _method("CudaSharedMemoryUnregister"),
    _method("TraceSetting", _trace),
    _method("LogSettings", _logs),
    Seed("/grpc.health.v1.Health/Check", schema.ModelReadyRequest),
    Seed("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", schema.ModelReadyRequest),
)  # fmt: skip
WEIGHTS = [seed.weight for seed in SEEDS]
STREAMS = frozenset((STREAM, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"))
