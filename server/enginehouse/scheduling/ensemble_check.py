"""Whether an ensemble's graph fits the models that it names. Pure: configs in, an error out.

Texts are those of Triton where it has one; they name the path of tensors or models that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from enginehouse.config.schema import DataType, ModelConfig, ModelEnsembling, ModelInput, ModelOutput
from enginehouse.errors import InvalidArgument
from enginehouse.scheduling.ensemble_graph import EnsembleGraph

ConfigLookup = Callable[[str, str], ModelConfig]
"""The config of a ready model by name and version ("" is the default one). Raises NotFound or Unavailable."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What one model says of an ensemble tensor."""

    model: str
    data_type: int
    dims: tuple[int, ...]
    batching: bool

    @property
    def full_dims(self) -> tuple[int, ...]:
        return (-1, *self.dims) if self.batching else self.dims


def check_ensemble(config: ModelConfig, lookup: ConfigLookup) -> bool:
    """True if the ensemble is decoupled, because one of its steps is.

    Raises InvalidArgument if the tensors of the graph don't fit its models, or what `lookup` raises.
    """
    members = [lookup(step.model_name, _version_of(step)) for step in config.ensemble_scheduling.step]
    tensors = _ensemble_tensors(config)
    for step, member in zip(config.ensemble_scheduling.step, members, strict=True):
        if 0 < member.max_batch_size < config.max_batch_size:
            raise InvalidArgument(
                f"ensemble {config.name} allows maximum batch size {config.max_batch_size}, but it contains "
                f"model {step.model_name} which only allows maximum batch size to be {member.max_batch_size}"
            )
        _check_inputs(config.name, step, member, tensors)
        _check_outputs(config.name, step, member, tensors)
    graph = EnsembleGraph.of(config)
    _check_conditions(graph, tensors)
    decoupled = [member.model_transaction_policy.decoupled for member in members]
    _check_streams(graph, decoupled)
    return any(decoupled)


def find_cycle(name: str, members_of: Callable[[str], Sequence[str]]) -> list[str]:
    """The path of ensembles from `name` back to itself, or [].

    `members_of` names the models that an ensemble consists of, and nothing for other models.
    """
    path: list[str] = []

    def search(current: str) -> bool:
        path.append(current)
        for member in members_of(current):
            if member == name:
                path.append(name)
                return True
            if member not in path and search(member):
                return True
        path.pop()
        return False

    return path if search(name) else []


def _version_of(step: ModelEnsembling.Step) -> str:
    return str(step.model_version) if step.model_version >= 0 else ""


def _ensemble_tensors(config: ModelConfig) -> dict[str, _Tensor]:
    sides: list[ModelInput | ModelOutput] = [*config.input, *config.output]
    return {
        tensor.name: _Tensor(config.name, tensor.data_type, client_dims(tensor), config.max_batch_size > 0)
        for tensor in sides
    }


def client_dims(tensor: ModelInput | ModelOutput) -> tuple[int, ...]:
    """The dims that an ensemble's steps see for one of its own tensors."""
    return tuple(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)


def _check_inputs(ensemble: str, step: ModelEnsembling.Step, member: ModelConfig, tensors: dict[str, _Tensor]) -> None:
    specs = {tensor.name: tensor for tensor in member.input}
    for name, tensor in step.input_map.items():
        if name not in specs:
            raise InvalidArgument(
                f"in ensemble {ensemble}, ensemble tensor {tensor} is mapping to non-existing input {name} "
                f"in model {step.model_name}"
            )
    for name, spec in specs.items():
        if name in step.input_map:
            seen = _Tensor(step.model_name, spec.data_type, tuple(spec.dims), member.max_batch_size > 0)
            _check_same(ensemble, step.input_map[name], tensors, seen)
        elif not spec.optional:
            raise InvalidArgument(
                f"in ensemble {ensemble}, input {name} in model {step.model_name} is not mapped to any ensemble tensors"
            )


def _check_outputs(ensemble: str, step: ModelEnsembling.Step, member: ModelConfig, tensors: dict[str, _Tensor]) -> None:
    specs = {tensor.name: tensor for tensor in member.output}
    for name, tensor in step.output_map.items():
        if name not in specs:
            raise InvalidArgument(
                f"in ensemble {ensemble}, ensemble tensor {tensor} is mapped from non-existing output {name} "
                f"in model {step.model_name}"
            )
    for name, tensor in step.output_map.items():
        spec = specs[name]
        seen = _Tensor(step.model_name, spec.data_type, tuple(spec.dims), member.max_batch_size > 0)
        _check_same(ensemble, tensor, tensors, seen)


def _check_same(ensemble: str, name: str, tensors: dict[str, _Tensor], seen: _Tensor) -> None:
    """The first model that mentions a tensor defines it; the others must agree."""
    known = tensors.setdefault(name, seen)
    place = f"in ensemble {ensemble}, ensemble tensor {name}: "
    if known.data_type != seen.data_type:
        raise InvalidArgument(
            f"{place}inconsistent data type: {DataType.Name(known.data_type)} is inferred from model "
            f"{known.model} while {DataType.Name(seen.data_type)} is inferred from model {seen.model}"
        )
    # A non-batching model may see the batch axis of a batching one as an ordinary axis.
    if not (_dims_agree(known.dims, seen.dims) or _dims_agree(known.full_dims, seen.full_dims)):
        raise InvalidArgument(
            f"{place}inconsistent shape: {_dims_text(known.full_dims)} is inferred from model {known.model} "
            f"while {_dims_text(seen.full_dims)} is inferred from model {seen.model}"
        )


def _check_conditions(graph: EnsembleGraph, tensors: dict[str, _Tensor]) -> None:
    for step in graph.steps:
        for name in sorted(step.reads - tensors.keys()):
            raise InvalidArgument(
                f"in ensemble {graph.name}, the condition of step {step.index} of model '{step.model_name}' reads "
                f"tensor '{name}', which nothing makes"
            )


def _dims_agree(left: Sequence[int], right: Sequence[int]) -> bool:
    return len(left) == len(right) and all(a == b or -1 in (a, b) for a, b in zip(left, right, strict=True))


def _dims_text(dims: Sequence[int]) -> str:
    return f"[{','.join(str(dim) for dim in dims)}]"


def _check_streams(graph: EnsembleGraph, decoupled: Sequence[bool]) -> None:
    """Answers of two decoupled steps can't be paired, so no step may read from both."""
    sources: dict[str, tuple[int, ...]] = dict.fromkeys(graph.inputs, ())
    pending = list(graph.steps)
    while pending:
        ready = [step for step in pending if all(tensor in sources for tensor in step.reads)]
        if not ready:
            return  # a cycle or an unproduced tensor: the config's own validation names those
        for step in ready:
            pending.remove(step)
            path = _join_streams(graph, step.model_name, [sources[name] for name in step.reads])
            if decoupled[step.index]:
                path = (*path, step.index)
            sources.update(dict.fromkeys(step.outputs.values(), path))
    _join_streams(graph, graph.name, [sources.get(name, ()) for name in graph.outputs])


def _join_streams(graph: EnsembleGraph, reader: str, paths: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    longest = max(paths, key=len, default=())
    if any(longest[: len(path)] != path for path in paths):
        raise InvalidArgument(
            f"in ensemble {graph.name}, step of model '{reader}' receives inputs originated from different "
            f"decoupled models"
        )
    return longest
