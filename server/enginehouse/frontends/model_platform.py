"""What metadata calls a model's platform: the config's, or what its backend is commonly called."""

from __future__ import annotations

from enginehouse.config.schema import ModelConfig

_BY_BACKEND = {
    "onnxruntime": "onnxruntime_onnx",
    "pytorch": "pytorch_libtorch",
    "tensorrt": "tensorrt_plan",
}


def platform_of(config: ModelConfig) -> str:
    return str(config.platform or _BY_BACKEND.get(config.backend, config.backend))
