"""What metadata say of a model, on either protocol."""

from __future__ import annotations

from collections.abc import Sequence

from enginehouse.config.schema import ModelConfig
from enginehouse.core import ServedVersion

_BY_BACKEND = {
    "onnxruntime": "onnxruntime_onnx",
    "pytorch": "pytorch_libtorch",
    "tensorrt": "tensorrt_plan",
}


def platform_of(config: ModelConfig) -> str:
    """The config's platform, or what its backend is commonly called."""
    return str(config.platform or _BY_BACKEND.get(config.backend, config.backend))


def listed_versions(served: ServedVersion, asked: str) -> Sequence[str]:
    """All ready ones, or the one that was asked for."""
    return [str(served.version)] if asked else served.ready_versions
