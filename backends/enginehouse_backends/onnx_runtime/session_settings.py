"""How a model's config and the backend's options become ONNX Runtime's session options and providers.

Pure: decides, and creates nothing but option objects. Parameter names are those of Triton's ONNX Runtime
backend. Two defaults differ, because a server shares its machine: threads don't spin while they wait, and
CPU memory comes from malloc instead of an arena that keeps the peak for ever (which costs up to 5 %, docs/backends.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from enginehouse.backend import LoadContext
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument, NotFound, Unsupported
from enginehouse_backends.parameters import Parameters, default_threads

ProviderList = list[tuple[str, dict[str, str]]]

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
PROVIDER_BY_ACCELERATOR = {
    "cuda": CUDA,
    "tensorrt": TENSORRT,
    "nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
SESSION_KEY_PREFIXES = ("session.", "optimization.", "mlas.", "ep.")
"""Parameters that begin so go to ONNX Runtime as they are."""
ARENA_SHRINKAGE = "memory.enable_memory_arena_shrinkage"

_TENSORRT_NAMES = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
_OPENVINO_NAMES = {"num_of_threads": "num_of_threads", "device": "device_type"}
_CUDA_CHOICES = {
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
}
_CUDA_PARAMETERS = ("gpu_mem_limit", "do_copy_in_default_stream", *_CUDA_CHOICES)


def session_options(context: LoadContext) -> onnxruntime.SessionOptions:
    """Raises InvalidArgument for a parameter that isn't what it must be."""
    parameters = Parameters(context.config)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = _optimization_level(context.config)
    options.enable_cpu_mem_arena = _wants_cpu_arena(parameters)
    if parameters.switch("enable_mem_pattern") is False:
        options.enable_mem_pattern = False
    modes = {0: onnxruntime.ExecutionMode.ORT_SEQUENTIAL, 1: onnxruntime.ExecutionMode.ORT_PARALLEL}
    mode = parameters.choice("execution_mode", modes)
    if mode is not None:
        options.execution_mode = mode
    _set_threads(options, context, parameters)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    for key, value in parameters.values.items():
        if key.startswith(SESSION_KEY_PREFIXES):
            options.add_session_config_entry(key, value)
    for library in context.config.model_operations.op_library_filename:
        options.register_custom_ops_library(str(_library_path(context, library)))
    return options


def _wants_cpu_arena(parameters: Parameters) -> bool:
    asked = parameters.switch("enable_mem_arena")
    # an arena that isn't there can't be shrunk: ONNX Runtime refuses to
    return asked if asked is not None else "cpu" in parameters.values.get(ARENA_SHRINKAGE, "")


def _optimization_level(config: ModelConfig) -> Any:
    levels = onnxruntime.GraphOptimizationLevel
    if not config.optimization.HasField("graph"):
        return levels.ORT_ENABLE_ALL
    by_level = {
        -1: levels.ORT_ENABLE_BASIC,
        0: levels.ORT_ENABLE_ALL,
        1: levels.ORT_ENABLE_EXTENDED,
        2: levels.ORT_DISABLE_ALL,
    }
    level = config.optimization.graph.level
    if level not in by_level:
        raise InvalidArgument(
            f"model '{config.name}': optimization.graph.level is {level}, it must be -1 (basic), 1 "
            f"(extended) or 2 (none); leave it out for all optimizations"
        )
    return by_level[level]


def _set_threads(options: onnxruntime.SessionOptions, context: LoadContext, parameters: Parameters) -> None:
    if context.backend_options.get("enable-global-threadpool") in ("1", "true"):
        options.use_per_session_threads = False
        return
    num_threads = parameters.number("intra_op_thread_count")
    options.intra_op_num_threads = num_threads if num_threads else default_threads(context.config)
    num_inter_threads = parameters.number("inter_op_thread_count")
    if num_inter_threads:
        options.inter_op_num_threads = num_inter_threads


def set_global_threads(backend_options: Mapping[str, str]) -> None:
    """Makes the one pool that every session of this process shares, if the options ask for it."""
    if backend_options.get("enable-global-threadpool") not in ("1", "true"):
        return
    keys = ("intra_op_thread_count", "inter_op_thread_count")
    onnxruntime.set_global_thread_pool_sizes(*(int(backend_options.get(key, "0")) for key in keys))


def _library_path(context: LoadContext, library: str) -> Path:
    candidates = [Path(library), context.version_directory / library, context.model_directory / library]
    for path in candidates:
        if path.is_file():
            return path
    raise NotFound(
        f"model '{context.name}': op_library_filename '{library}' is neither in {context.version_directory} "
        f"nor in {context.model_directory}"
    )


def run_options(config: ModelConfig) -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4  # a failed run raises; its text need not stand on stderr too
    devices = Parameters(config).values.get(ARENA_SHRINKAGE)
    if devices:
        options.add_run_config_entry(ARENA_SHRINKAGE, devices)
    return options


# --- providers -----------------------------------------------------------------------------------------


def providers(config: ModelConfig, device: str, available: Sequence[str]) -> ProviderList:
    """In the order in which ONNX Runtime offers them each node; the CPU is last.

    Raises Unsupported, naming what this onnxruntime has, for a provider that it was built without.
    """
    kind, _, index = device.partition(":")
    chosen = _gpu_providers(config, index) if kind == "cuda" else _cpu_providers(config)
    for name, _ in chosen:
        if name not in available:
            raise Unsupported(
                f"model '{config.name}' needs onnxruntime's {name} on {device}; this onnxruntime "
                f"{onnxruntime.__version__} has {', '.join(available)} (GPU providers come with "
                f"pip install 'enginehouse[gpu]')"
            )
    return [*chosen, (CPU, {})]


def _gpu_providers(config: ModelConfig, index: str) -> ProviderList:
    cuda_options = {"device_id": index, **_cuda_parameters(config)}
    chosen: ProviderList = []
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        if accelerator.name == "cuda":
            cuda_options.update(accelerator.parameters)
        elif accelerator.name == "tensorrt":
            options = _tensorrt_options(config, accelerator.parameters)
            chosen.append((TENSORRT, {"device_id": index, **options}))
        else:
            provider = _provider_name(config, accelerator.name)
            chosen.append((provider, {"device_id": index, **accelerator.parameters}))
    return [*chosen, (CUDA, cuda_options)]


def _cpu_providers(config: ModelConfig) -> ProviderList:
    chosen: ProviderList = []
    for accelerator in config.optimization.execution_accelerators.cpu_execution_accelerator:
        provider = _provider_name(config, accelerator.name)
        chosen.append((provider, {_OPENVINO_NAMES.get(k, k): v for k, v in accelerator.parameters.items()}))
    return chosen


def _provider_name(config: ModelConfig, accelerator: str) -> str:
    provider = PROVIDER_BY_ACCELERATOR.get(accelerator)
    if provider is None:
        raise InvalidArgument(
            f"unknown execution accelerator '{accelerator}' is requested for model '{config.name}'; allowed "
            f"are {', '.join(PROVIDER_BY_ACCELERATOR)}"
        )
    return provider


def _cuda_parameters(config: ModelConfig) -> dict[str, str]:
    """The four that may stand among the model's own parameters."""
    parameters = Parameters(config)
    options = {}
    for key in _CUDA_PARAMETERS:
        if key not in parameters.values:
            continue
        if key in _CUDA_CHOICES:
            options[key] = parameters.choice(key, dict(enumerate(_CUDA_CHOICES[key])))
        else:
            options[key] = str(parameters.number(key))
    return options


def _tensorrt_options(config: ModelConfig, parameters: Mapping[str, str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for key, value in parameters.items():
        if key == "precision_mode":
            precision = {"FP32": {}, "FP16": {"trt_fp16_enable": "1"}, "INT8": {"trt_int8_enable": "1"}}
            if value not in precision:
                raise InvalidArgument(
                    f"model '{config.name}': unsupported precision mode '{value}', it must be FP32, FP16 or INT8"
                )
            options.update(precision[value])
        elif key in _TENSORRT_NAMES or key.startswith("trt_"):
            options[_TENSORRT_NAMES.get(key, key)] = value
        else:
            known = ", ".join(("precision_mode", *_TENSORRT_NAMES, "trt_*"))
            raise InvalidArgument(
                f"unknown parameter '{key}' is provided for TensorRT Execution Accelerator of model "
                f"'{config.name}'; known are {known}"
            )
    return options
