"""Which backend serves which platform and artifact: the names that configs use, and what they mean here.

`backend` is what a config says and clients read back; `implementation_of` is the entry point that runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

ENSEMBLE_PLATFORM = "ensemble"


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of artifact. Formats are tried in the order of FORMATS."""

    backend: str
    platform: str
    filename: str
    may_be_folder: bool = False


FORMATS = (
    Format("tensorrt", "tensorrt_plan", "model.plan"),
    Format("onnxruntime", "onnxruntime_onnx", "model.onnx", may_be_folder=True),
    Format("pytorch", "pytorch_libtorch", "model.pt"),
    Format("pytorch", "torch_export", "model.pt2"),
    Format("python", "", "model.py"),
    Format("vllm", "", "model.json"),
)

# The platforms that a backend accepts; backends that are not listed accept any.
PLATFORMS_BY_BACKEND = {
    "tensorrt": ("tensorrt_plan",),
    "onnxruntime": ("onnxruntime_onnx",),
    "pytorch": ("pytorch_libtorch", "torch_export", "torch_aoti"),
}

_BACKEND_BY_PLATFORM = {format.platform: format.backend for format in FORMATS if format.platform}
_BACKEND_BY_PLATFORM |= {
    "torch_aoti": "pytorch",
    "pytorch_aoti": "pytorch",
    "transformers": "transformers",
    "llm": "llm",
    "vllm": "vllm",
    "python": "python",
}
PLATFORMS = (*sorted(_BACKEND_BY_PLATFORM), ENSEMBLE_PLATFORM)
"""All that a config may name."""
_IMPLEMENTATIONS = {"vllm": "llm"}

# What a bare file must end in to be a model, and the format that it is then.
FORMAT_BY_SUFFIX = {
    ".plan": FORMATS[0],
    ".onnx": FORMATS[1],
    ".pt": FORMATS[2],
    ".pt2": FORMATS[3],
}


def backend_of_platform(platform: str) -> str:
    """The backend that Triton's `platform` names, or ""."""
    return _BACKEND_BY_PLATFORM.get(platform, "")


def implementation_of(backend: str) -> str:
    """The entry point in `enginehouse.backends` that serves a config's `backend`."""
    return _IMPLEMENTATIONS.get(backend, backend)
