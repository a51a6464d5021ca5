"""What makes a whole config wrong: Triton's checks, in its order, with its texts.

Two stages, as clients see them differ: `check_structure` when a model is found in the repository, before
anything is loaded; `check_tensors` when a version loads and the backend has filled in what it knows. Each is
a generator of Problems; `validate` and `validate_tensors` raise the first. Where instances may run is checked
by execution/placement.py, whether an ensemble fits its models by scheduling/ensemble_check.py. No I/O here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from enginehouse.config.backends import PLATFORMS, PLATFORMS_BY_BACKEND
from enginehouse.config.ensembles import check_ensemble_structure
from enginehouse.config.problems import Problem, nearest_match
from enginehouse.config.schema import (
    TYPE_FP32,
    TYPE_INT32,
    TYPE_INVALID,
    BatchInput,
    BatchOutput,
    ModelConfig,
    ModelInput,
    ModelMetrics,
    ModelOutput,
    ModelQueuePolicy,
)
from enginehouse.config.sequences import check_sequence_batching
from enginehouse.config.serving import check_serving, check_serving_tensors
from enginehouse.errors import InvalidArgument

TENSORRT_PLATFORM = "tensorrt_plan"
ENSEMBLE_PLATFORM = "ensemble"


def validate(config: ModelConfig, directory_name: str | None = None) -> None:
    """Raises InvalidArgument if the config can't be right, whatever the backend says.

    `directory_name`: the folder that the model was found in, which must be its name.
    """
    raise_first(check_structure(config, directory_name))


def validate_tensors(config: ModelConfig) -> None:
    """Raises InvalidArgument for an input, output, batch tensor or profile that can't be right."""
    raise_first(check_tensors(config))


def raise_first(problems: Iterable[Problem]) -> None:
    for problem in problems:
        raise InvalidArgument(problem.text)


def check_structure(config: ModelConfig, directory_name: str | None = None) -> Iterator[Problem]:
    """Everything but tensors and instance groups, which a backend may still fill in."""
    yield from _check_identity(config)
    name = config.name
    if config.max_batch_size < 0:
        yield Problem(f"'max_batch_size' must be non-negative value for {name}", "max_batch_size")
    if not config.HasField("version_policy"):
        yield Problem(f"must specify 'version policy' for {name}", "version_policy")
    if config.HasField("dynamic_batching"):
        yield from _check_dynamic_batching(config)
    if config.HasField("sequence_batching"):
        yield from check_sequence_batching(config)
    if config.HasField("ensemble_scheduling"):
        yield from check_ensemble_structure(config)
    elif config.platform == ENSEMBLE_PLATFORM:
        yield Problem(
            f"ensemble scheduling must be set for ensemble {name} whose platform is ensemble", "platform"
        )
    if config.model_transaction_policy.decoupled and config.response_cache.enable:
        yield Problem(
            f"Response Cache does not currently support model {name} with 'decoupled' transaction policy. "
            "Please disable the response cache.",
            "response_cache",
        )
    yield from _check_metrics(config.model_metrics)
    yield from check_serving(config)
    if directory_name is not None and directory_name != name:
        yield Problem(
            f"unexpected directory name '{directory_name}' for model '{name}', directory name must equal "
            "model name",
            "name",
        )


def _known_platforms(found: str) -> str:
    """What may have been meant; nothing for a platform that is not given, as Triton has it."""
    if not found:
        return ""
    nearest = nearest_match(found, PLATFORMS)
    hint = f"; did you mean '{nearest}'?" if nearest else ""
    return f"{hint}; allowed: {', '.join(PLATFORMS)}"


def _check_identity(config: ModelConfig) -> Iterator[Problem]:
    if not config.name:
        yield Problem("model configuration must specify 'name'", "name")
    if not config.backend and config.platform != ENSEMBLE_PLATFORM:
        hints = _known_platforms(config.platform)
        yield Problem(f"unexpected platform type '{config.platform}' for {config.name}{hints}", "platform")
    if config.backend and config.platform == ENSEMBLE_PLATFORM:
        yield Problem(
            f"Ensemble model '{config.name}' must have platform type 'ensemble' and empty backend type",
            "backend",
        )
        return
    platforms = PLATFORMS_BY_BACKEND.get(config.backend)
    if platforms is not None and config.platform not in platforms:
        yield Problem(
            f"unexpected 'platform' and 'backend' pair, got:{config.platform}, {config.backend}", "platform"
        )


def _check_dynamic_batching(config: ModelConfig) -> Iterator[Problem]:
    batching, name = config.dynamic_batching, config.name
    for index, size in enumerate(batching.preferred_batch_size):
        place = f"dynamic_batching.preferred_batch_size[{index}]"
        if size <= 0:
            yield Problem(f"dynamic batching preferred size must be positive for {name}", place)
        elif size > config.max_batch_size:
            yield Problem(f"dynamic batching preferred size must be <= max batch size for {name}", place)
    levels = batching.priority_levels
    if levels:
        if not 1 <= batching.default_priority_level <= levels:
            yield Problem(
                f"default priority level must be in range [1, {levels}] for {name}",
                "dynamic_batching.default_priority_level",
            )
        for level in sorted(batching.priority_queue_policy):
            if not 1 <= level <= levels:
                yield Problem(
                    f"priority queue policy must have priority level in range [1, {levels}] for {name}",
                    f'dynamic_batching.priority_queue_policy["{level}"]',
                )
    if batching.preserve_ordering:
        yield from _check_preserve_ordering(config)


def _check_preserve_ordering(config: ModelConfig) -> Iterator[Problem]:
    batching = config.dynamic_batching
    if batching.priority_levels > 1:
        yield Problem(
            f"Only one priority level is allowed when 'preserve_ordering' is true for {config.name}",
            "dynamic_batching.priority_levels",
        )
    policies = {"default_queue_policy": batching.default_queue_policy}
    for level in sorted(batching.priority_queue_policy):
        policies[f'priority_queue_policy["{level}"]'] = batching.priority_queue_policy[level]
    for place, policy in policies.items():
        if policy.default_timeout_microseconds and policy.timeout_action == ModelQueuePolicy.DELAY:
            yield Problem(
                "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for "
                f"{config.name}",
                f"dynamic_batching.{place}",
            )


def _check_metrics(metrics: ModelMetrics) -> Iterator[Problem]:
    for index, control in enumerate(metrics.metric_control):
        place = f"model_metrics.metric_control[{index}]"
        if not control.HasField("metric_identifier"):
            yield Problem("metric control must specify 'metric_identifier'", place)
        elif not control.metric_identifier.family:
            yield Problem("metric identifier must specify non-empty 'family'", place)
        if not control.HasField("histogram_options"):
            yield Problem("metric control must specify 'histogram_options'", place)
        elif not control.histogram_options.buckets:
            yield Problem("histogram options must specify non-empty 'buckets'", place)


def check_tensors(config: ModelConfig) -> Iterator[Problem]:
    """Names, types, dims and reshapes of inputs and outputs; batch inputs and outputs; TensorRT profiles."""
    yield from _check_profiles(config)
    suffix = f" for {config.name}"
    for index, tensor in enumerate(config.input):
        for problem in _check_input(tensor, config):
            yield Problem(problem.text + suffix, _join(f"input[{index}]", problem.field))
    for index, output in enumerate(config.output):
        for problem in _check_shape(output, config, "model output "):
            yield Problem(problem.text + suffix, _join(f"output[{index}]", problem.field))
        for problem in _check_tensorrt_only(output, config, "output"):
            yield Problem(problem.text + suffix, _join(f"output[{index}]", problem.field))
    for problem in _check_batch_tensors(config):
        yield Problem(problem.text + suffix, problem.field)
    yield from check_serving_tensors(config)


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if field else path


def _check_input(tensor: ModelInput, config: ModelConfig) -> Iterator[Problem]:
    yield from _check_shape(tensor, config, "model input ")
    if tensor.format != ModelInput.FORMAT_NONE and len(tensor.dims) != 3:
        yield Problem("model input NHWC/NCHW require 3 dims", "format")
    yield from _check_tensorrt_only(tensor, config, "input")


def _check_tensorrt_only(
    tensor: ModelInput | ModelOutput, config: ModelConfig, direction: str
) -> Iterator[Problem]:
    is_tensorrt = config.platform == TENSORRT_PLATFORM
    if tensor.is_shape_tensor and not is_tensorrt:
        yield Problem("shape tensors are only supported for TensorRT platform", "is_shape_tensor")
    if tensor.is_non_linear_format_io and not is_tensorrt:
        yield Problem(
            "Non-linear IO format is only supported for the TensorRT platform", "is_non_linear_format_io"
        )
    elif tensor.is_non_linear_format_io and len(tensor.dims) != 3:
        yield Problem(f"Non-linear IO format {direction} requires 3 dims", "is_non_linear_format_io")


def _check_shape(tensor: ModelInput | ModelOutput, config: ModelConfig, prefix: str) -> Iterator[Problem]:
    if not tensor.name:
        yield Problem(f"{prefix}must specify 'name'")
        return
    prefix = f"{prefix}'{tensor.name}' "
    if tensor.data_type == TYPE_INVALID:
        yield Problem(f"{prefix}must specify 'data_type'", "data_type")
    if not tensor.dims:
        yield Problem(f"{prefix}must specify 'dims'", "dims")
        return
    has_reshape = tensor.HasField("reshape")
    if has_reshape and not tensor.reshape.shape and config.max_batch_size == 0:
        yield Problem(
            f"{prefix}cannot have empty reshape for non-batching model as scalar tensors are not supported",
            "reshape",
        )
    any_size = "integer >= 1, or -1 to indicate a variable-size dimension"
    if bad := _first_bad_dim(tensor.dims, "dims"):
        yield Problem(f"{prefix}dimension must be {any_size}", bad)
    elif has_reshape and (bad := _first_bad_dim(tensor.reshape.shape, "reshape.shape")):
        yield Problem(f"{prefix}reshape dimensions must be {any_size}", bad)
    elif has_reshape and (difference := _reshape_difference(tensor.dims, tensor.reshape.shape)):
        yield Problem(f"{prefix}has different {difference} for dims and reshape", "reshape")


def _first_bad_dim(dims: Iterable[int], field: str) -> str:
    for index, dim in enumerate(dims):
        if dim < 1 and dim != -1:
            return f"{field}[{index}]"
    return ""


def _reshape_difference(dims: Collection[int], shape: Collection[int]) -> str:
    """What keeps `shape` from holding the same elements as `dims`, or "".

    Variable-size dims must pair up, with equal products between them: [2, 4, -1, 6] fits [8, -1, 1, 6].
    """
    if not shape and _products(dims) == [1]:
        return ""
    if (-1 in dims) != (-1 in shape):
        return "size"
    if len(_products(dims)) != len(_products(shape)):
        return "number of variable-size dimensions"
    return "size" if _products(dims) != _products(shape) else ""


def _products(dims: Iterable[int]) -> list[int]:
    """Element counts of the stretches between variable-size dims."""
    products = [1]
    for dim in dims:
        if dim == -1:
            products.append(1)
        else:
            products[-1] *= dim
    return products


def _check_batch_tensors(config: ModelConfig) -> Iterator[Problem]:
    inputs = {tensor.name for tensor in config.input}
    outputs = {tensor.name for tensor in config.output}
    for index, batch_input in enumerate(config.batch_input):
        place = f"batch_input[{index}]"
        if (found := len(batch_input.source_input)) != 1:
            kind = BatchInput.Kind.Name(batch_input.kind)
            yield Problem(f"batch input kind '{kind}' expects 1 source input, got {found}", place)
        if batch_input.data_type not in (TYPE_INT32, TYPE_FP32):
            yield Problem("batch input data type must be TYPE_INT32 or TYPE_FP32", f"{place}.data_type")
        yield from _check_sources(batch_input.source_input, inputs, place)
    for index, batch_output in enumerate(config.batch_output):
        place = f"batch_output[{index}]"
        if (found := len(batch_output.source_input)) != 1:
            kind = BatchOutput.Kind.Name(batch_output.kind)
            yield Problem(f"batch output kind '{kind}' expects 1 source input, got {found}", place)
        yield from _check_sources(batch_output.source_input, inputs, place)
        seen: set[str] = set()
        for target in batch_output.target_name:
            if target not in outputs:
                yield Problem(f"unknown target output name '{target}'", f"{place}.target_name")
            elif target in seen:
                yield Problem(
                    f"target output name '{target}' can only be specified once", f"{place}.target_name"
                )
            seen.add(target)


def _check_sources(sources: Iterable[str], inputs: set[str], place: str) -> Iterator[Problem]:
    for source in sources:
        if source not in inputs:
            yield Problem(f"unknown source input name '{source}'", f"{place}.source_input")


def _check_profiles(config: ModelConfig) -> Iterator[Problem]:
    """TensorRT optimization profiles of instance groups."""
    is_tensorrt = config.platform == TENSORRT_PLATFORM
    for index, group in enumerate(config.instance_group):
        head = f"instance group {group.name} of model {config.name} and platform {config.platform}"
        place = f"instance_group[{index}].profile"
        if group.profile and not is_tensorrt:
            yield Problem(
                f"{head}specifies profile field which is only supported for TensorRT models", place
            )
        for profile in group.profile if is_tensorrt else ():
            if not profile.isdigit():
                yield Problem(
                    f"{head} specifies invalid profile {profile}. The field should contain the string "
                    "representation of a non-negative integer.",
                    place,
                )
