"""From the config as written to the config as served: backend, defaults, what a backend found.

    config = at_poll(config, model_directory)       when the model is found; then validation.validate
    found = backend.complete_config(...)            when a version loads
    config = merge_found(config, found)
    config = at_load(config, version_directory)     then validation.validate_tensors

The rules are Triton's, as its answers to /config show. All functions give a new config. Only at_poll and
at_load look at files, through artifacts.py.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from pathlib import Path

from enginehouse.config.artifacts import Artifacts, inspect_folder, inspect_model
from enginehouse.config.backends import (
    ENSEMBLE_PLATFORM,
    FORMAT_BY_SUFFIX,
    FORMATS,
    Format,
    backend_of_platform,
)
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import Internal, InvalidArgument

DEFAULT_SEQUENCE_IDLE_US = 1_000_000


def at_poll(config: ModelConfig, model_directory: Path, name: str = "") -> ModelConfig:
    """As far as it can be completed before a backend looks. `name` is the folder's by default.

    Raises InvalidArgument if nothing tells the backend.
    """
    artifacts = inspect_model(model_directory)
    return normalise(complete_backend(config, name or model_directory.name, artifacts))


def at_load(config: ModelConfig, version_directory: Path) -> ModelConfig:
    """With what this version's files and the backend's findings still imply."""
    artifacts = inspect_folder(version_directory) if version_directory.is_dir() else Artifacts()
    return normalise(complete_backend(config, config.name, artifacts))


def copy_of(config: ModelConfig) -> ModelConfig:
    result = ModelConfig()
    result.CopyFrom(config)
    return result


def complete_backend(config: ModelConfig, name: str, artifacts: Artifacts) -> ModelConfig:
    """With name, backend, platform and default_model_filename, as far as they follow from each other or
    from the files.

    Raises InvalidArgument if nothing tells the backend.
    """
    config = copy_of(config)
    if not config.name:
        config.name = name
    if config.platform == ENSEMBLE_PLATFORM or config.HasField("ensemble_scheduling"):
        return config
    if not config.backend:
        _choose_backend(config, name, artifacts)
    for form in FORMATS:
        if config.backend == form.backend and config.platform in ("", form.platform):
            _apply(config, _best_form(config, form, artifacts))
            break
    return config


def _choose_backend(config: ModelConfig, name: str, artifacts: Artifacts) -> None:
    config.backend = backend_of_platform(config.platform)
    if config.backend or config.platform:
        return
    if config.default_model_filename:
        form = _format_of_filename(config.default_model_filename)
        config.backend = form.backend if form is not None else ""
        return
    if (found := _format_in(artifacts)) is not None:
        form, filename = found
        config.backend, config.platform, config.default_model_filename = form.backend, form.platform, filename
    elif artifacts.is_hugging_face:
        config.backend = "llm" if artifacts.generates else "transformers"
    elif "." in name:
        config.backend = name.split(".", 1)[1]
        config.default_model_filename = f"model.{config.backend}"
    else:
        raise InvalidArgument(
            f"Invalid model name: Could not determine backend for model '{name}' with no backend in model "
            "configuration. Expected model name of the form 'model.<backend_name>'."
        )


def _best_form(config: ModelConfig, first: Format, artifacts: Artifacts) -> Format:
    """A backend with several formats takes the one whose file is there."""
    if config.platform or config.default_model_filename:
        return first
    forms = [form for form in FORMATS if form.backend == config.backend]
    return next((form for form in forms if form.filename in artifacts.files), first)


def _apply(config: ModelConfig, form: Format) -> None:
    if not config.platform:
        named = FORMAT_BY_SUFFIX.get(_suffix(config.default_model_filename))
        matches = named is not None and named.backend == form.backend
        config.platform = named.platform if named is not None and matches else form.platform
    if not config.default_model_filename:
        config.default_model_filename = form.filename


def _suffix(filename: str) -> str:
    return filename[filename.rindex(".") :] if "." in filename else ""


def _format_of_filename(filename: str) -> Format | None:
    exact = next((form for form in FORMATS if form.filename == filename), None)
    return exact or FORMAT_BY_SUFFIX.get(_suffix(filename))


def _format_in(artifacts: Artifacts) -> tuple[Format, str] | None:
    """By the standard names first; else by the only file that has a known suffix."""
    for form in FORMATS:
        if form.filename in artifacts.files or (form.may_be_folder and form.filename in artifacts.folders):
            return form, form.filename
    known = [name for name in artifacts.files if _suffix(name) in FORMAT_BY_SUFFIX]
    return (FORMAT_BY_SUFFIX[_suffix(known[0])], known[0]) if len(known) == 1 else None


def normalise(config: ModelConfig) -> ModelConfig:
    """With the defaults that don't depend on the backend."""
    config = copy_of(config)
    if not config.HasField("version_policy"):
        config.version_policy.latest.num_versions = 1
    if config.HasField("dynamic_batching"):
        _default_sizes(config.dynamic_batching.preferred_batch_size, config.max_batch_size)
    if config.HasField("sequence_batching"):
        batching = config.sequence_batching
        batching.max_sequence_idle_microseconds = (
            batching.max_sequence_idle_microseconds or DEFAULT_SEQUENCE_IDLE_US
        )
        if batching.HasField("oldest"):
            _default_sizes(batching.oldest.preferred_batch_size, config.max_batch_size)
    if not config.HasField("ensemble_scheduling"):
        for memory in ("input_pinned_memory", "output_pinned_memory"):
            if not config.optimization.HasField(memory):
                getattr(config.optimization, memory).enable = True
    return config


def _default_sizes(sizes: MutableSequence[int], max_batch_size: int) -> None:
    if not sizes and max_batch_size > 0:
        sizes.append(max_batch_size)


def merge_found(config: ModelConfig, found: ModelConfig) -> ModelConfig:
    """The config with what a backend may complete: batch size, inputs, outputs, scheduler, decoupled.

    Raises Internal if the backend wants another scheduler than the one that is configured.
    """
    config = copy_of(config)
    config.max_batch_size = found.max_batch_size
    for name in ("input", "output"):
        config.ClearField(name)
        getattr(config, name).extend(getattr(found, name))
    ours, theirs = (message.WhichOneof("scheduling_choice") for message in (config, found))
    if ours is None and theirs is not None:
        getattr(config, theirs).CopyFrom(getattr(found, theirs))
    elif ours != theirs:
        numbers = ModelConfig.DESCRIPTOR.fields_by_name
        was = numbers[str(ours)].number
        raise Internal(f"Cannot update scheduling choice from {was} to {was} when auto-completing.")
    if found.HasField("model_transaction_policy"):
        config.model_transaction_policy.decoupled = found.model_transaction_policy.decoupled
    if found.serving.llm.tensor_parallel_size:  # a model.json may say it
        config.serving.llm.tensor_parallel_size = found.serving.llm.tensor_parallel_size
    return normalise(config)
