"""Everything that is wrong or odd about a model's folder, all at once, with places.

Errors are what the server would refuse; warnings are what it accepts and probably wasn't meant. Reads files,
loads nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path

from enginehouse.config.artifacts import inspect_folder, version_folders, version_numbers
from enginehouse.config.backends import implementation_of
from enginehouse.config.completion import at_poll
from enginehouse.config.problems import ConfigError, Position, Problem, nearest_match
from enginehouse.config.reading import SUFFIXES, ConfigFile, read_config, read_file
from enginehouse.config.schema import TYPE_INVALID, ModelConfig, ModelInstanceGroup, ModelWarmup
from enginehouse.config.validation import check_structure, check_tensors
from enginehouse.errors import EnginehouseError

BACKENDS_THAT_KNOW_THEIR_TENSORS = ("onnxruntime", "tensorrt", "transformers", "llm", "vllm")


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    severity: Severity
    text: str
    position: Position
    field: str = ""

    def __str__(self) -> str:
        parts = (str(self.position), self.severity.value, self.field, self.text)
        return ": ".join(part for part in parts if part)


def is_model_folder(folder: Path) -> bool:
    """Whether the folder is a model and not a repository of models."""
    found = inspect_folder(folder)
    has_config = any(f"config{suffix}" in found.files for suffix in SUFFIXES)
    return has_config or bool(version_numbers(folder)) or found.is_hugging_face


def lint_repository(root: Path, variant: str = "") -> Iterator[Finding]:
    """Of every model in it."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    names = {folder.name for folder in folders}
    for folder in folders:
        yield from lint_model(folder, variant, names)


def lint_model(folder: Path, variant: str = "", siblings: Collection[str] = ()) -> Iterator[Finding]:
    """Of one model. `siblings` are the models that an ensemble may use; empty is not known."""
    try:
        found = read_config(folder, variant) or ConfigFile(ModelConfig(), folder)
        config = at_poll(found.config, folder)
    except ConfigError as error:
        yield Finding(Severity.ERROR, error.text_without_place(), error.position, error.field)
        return
    except EnginehouseError as error:
        yield Finding(Severity.ERROR, str(error), Position(str(folder)))
        return
    for problem in check_structure(config, folder.name):
        yield _finding(Severity.ERROR, problem, found)
    for problem in check_tensors(config):
        if not _may_be_filled_in(config, problem):
            yield _finding(Severity.ERROR, problem, found)
    for problem in (*_odd_in_config(config, siblings), *_odd_in_files(config, folder)):
        yield _finding(Severity.WARNING, problem, found)


def lint_file(path: Path) -> Iterator[Finding]:
    """Of a config alone, wherever it lies: what can be said without the model's folder."""
    try:
        found = read_file(path)
    except ConfigError as error:
        yield Finding(Severity.ERROR, error.text_without_place(), error.position, error.field)
        return
    for problem in check_tensors(found.config):
        if not _may_be_filled_in(found.config, problem):
            yield _finding(Severity.ERROR, problem, found)
    for problem in _odd_in_config(found.config, ()):
        yield _finding(Severity.WARNING, problem, found)


def _finding(severity: Severity, problem: Problem, found: ConfigFile) -> Finding:
    return Finding(severity, problem.text, found.position(problem.field), problem.field)


def _may_be_filled_in(config: ModelConfig, problem: Problem) -> bool:
    is_missing = "must specify" in problem.text
    return is_missing and config.backend in (*BACKENDS_THAT_KNOW_THEIR_TENSORS, "")


def _odd_in_config(config: ModelConfig, siblings: Collection[str]) -> Iterator[Problem]:
    for field in ("input", "output"):
        seen: set[str] = set()
        for index, tensor in enumerate(getattr(config, field)):
            if tensor.name in seen:
                yield Problem(f"'{tensor.name}' is there twice", f"{field}[{index}]")
            seen.add(tensor.name)
    if config.HasField("dynamic_batching") and config.max_batch_size == 0:
        yield Problem("does nothing while max_batch_size is 0", "dynamic_batching")
    for index, group in enumerate(config.instance_group):
        yield from _odd_in_group(group, f"instance_group[{index}]")
    for index, warmup in enumerate(config.model_warmup):
        yield from _odd_in_warmup(config, warmup, f"model_warmup[{index}]")
    if config.backend:
        yield from _odd_backend(config.backend)
    for index, step in enumerate(config.ensemble_scheduling.step):
        if siblings and step.model_name and step.model_name not in siblings:
            nearest = nearest_match(step.model_name, siblings)
            hint = f"; did you mean '{nearest}'?" if nearest else ""
            place = f"ensemble_scheduling.step[{index}].model_name"
            yield Problem(f"there is no model '{step.model_name}' beside this one{hint}", place)


def _odd_in_group(group: ModelInstanceGroup, place: str) -> Iterator[Problem]:
    if group.count < 0:
        yield Problem(f"{group.count} counts as 1", f"{place}.count")
    if group.gpus and group.kind in (ModelInstanceGroup.KIND_CPU, ModelInstanceGroup.KIND_MODEL):
        kind = ModelInstanceGroup.Kind.Name(group.kind)
        yield Problem(f"{kind} has no GPUs; the model will be refused", f"{place}.gpus")


def _odd_in_warmup(config: ModelConfig, warmup: ModelWarmup, place: str) -> Iterator[Problem]:
    if warmup.batch_size == 0:
        yield Problem("runs nothing while batch_size is 0", place)
        return
    if config.max_batch_size and warmup.batch_size > config.max_batch_size:
        yield Problem(f"{warmup.batch_size} is over max_batch_size {config.max_batch_size}", f"{place}.batch_size")
    needed = {tensor.name for tensor in config.input if not tensor.optional}
    if needed and (missing := sorted(needed - set(warmup.inputs))):
        yield Problem(f"lacks the inputs {', '.join(missing)}; the model will be refused", f"{place}.inputs")
    for name in sorted(warmup.inputs):
        warm_input = warmup.inputs[name]
        if warm_input.data_type == TYPE_INVALID or warm_input.WhichOneof("input_data_type") is None:
            text = "needs a data_type and one of zero_data, random_data, input_data_file"
            yield Problem(text, f'{place}.inputs["{name}"]')


def _odd_backend(backend: str) -> Iterator[Problem]:
    known = {point.name for point in entry_points(group="enginehouse.backends")}
    if known and implementation_of(backend) not in known:
        nearest = nearest_match(backend, known)
        hint = f"did you mean '{nearest}'?" if nearest else f"installed are {', '.join(sorted(known))}"
        yield Problem(f"there is no backend '{backend}'; {hint}", "backend")


def _odd_in_files(config: ModelConfig, folder: Path) -> Iterator[Problem]:
    versions = version_folders(folder, config)
    if not versions and not config.HasField("ensemble_scheduling"):
        yield Problem("there is no version folder ('1', '2', …)")
    for version in config.version_policy.specific.versions:
        if version not in versions:
            yield Problem(f"version {version} is not there", "version_policy.specific.versions")
    filename = config.default_model_filename
    if filename and not config.cc_model_filenames:
        for version, version_folder in versions.items():
            if not (version_folder / filename).exists():
                yield Problem(f"version {version} has no '{filename}'", "default_model_filename")
    for index, output in enumerate(config.output):
        if output.label_filename and not (folder / output.label_filename).is_file():
            yield Problem(f"there is no file '{output.label_filename}'", f"output[{index}].label_filename")
    for index, warmup in enumerate(config.model_warmup):
        for name in sorted(warmup.inputs):
            data_file = warmup.inputs[name].input_data_file
            if data_file and not (folder / "warmup" / data_file).is_file():
                yield Problem(f"there is no file 'warmup/{data_file}'", f'model_warmup[{index}].inputs["{name}"]')
