"""The tensors that one run of an ensemble holds, and when they suffice. No I/O and no clock here.

Each answer of a decoupled step is a branch of its own: a tensor is kept under the path of answers that led to
it, and readers on longer paths see it too. What has been read by all its readers is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from enginehouse.config.schema import ModelConfig
from enginehouse.scheduling.ensemble_graph import Plan
from enginehouse.types import CorrelationId, Tensor

Path: TypeAlias = tuple[int, ...]
"""Which answers of decoupled steps led to a tensor: () for none, (2,) for the third answer of one."""


@dataclass(frozen=True, slots=True)
class Sequencing:
    """The sequence flags that a tensor carries on to the steps that read it."""

    correlation_id: CorrelationId
    start: bool
    end: bool


@dataclass(slots=True)
class Value:
    """A tensor of the run; `tensor` is None where it is missing."""

    tensor: Tensor | None
    batch_size: int = 0
    sequencing: Sequencing | None = None
    is_skipped: bool = False
    """It is missing because the steps that make it did not run."""
    num_readers: int = 0


class RunTensors:
    """See module."""

    def __init__(self, plan: Plan) -> None:
        self._num_readers = plan.num_readers
        self._values: dict[str, dict[Path, Value]] = {}
        self._has_branches = False

    def __len__(self) -> int:
        return sum(map(len, self._values.values()))

    def put(self, name: str, path: Path, value: Value) -> None:
        if path:
            self._has_branches = True
            value.num_readers = self._num_readers.get(name, 0)
        known = self._values.get(name)
        if known is None:
            self._values[name] = {path: value}
        else:
            known[path] = value

    def is_made(self, name: str, path: Path) -> bool:
        """Whether readers on this path see the tensor already, or on one that it leads to."""
        return any(known[: len(path)] == path or path[: len(known)] == known for known in self._values.get(name, ()))

    def ready_paths(self, names: Iterable[str], branch: Path) -> list[Path]:
        """The paths on which all of these tensors exist now that there is something new on `branch`."""
        if not self._has_branches:
            return [()] if all(name in self._values for name in names) else []
        names = tuple(names)
        candidates = {branch}
        for name in names:
            candidates.update(path for path in self._values.get(name, ()) if path[: len(branch)] == branch)
        ready = []
        for path in sorted(candidates):
            found = [self._visible(name, path) for name in names]
            if all(visible is not None for visible in found) and path in found:
                ready.append(path)
        return ready

    def read(self, name: str, path: Path) -> Value:
        """The tensor as a reader on `path` sees it; forgotten after its last reader."""
        if not path:
            return self._values[name][path]
        where = self._visible(name, path)
        assert where is not None, "bug: readers wait until all tensors are there"
        value = self._values[name][where]
        if where == path:
            value.num_readers -= 1
            if not value.num_readers:
                del self._values[name][where]
        return value

    def _visible(self, name: str, path: Path) -> Path | None:
        """The longest path up to `path` under which the tensor exists."""
        values = self._values.get(name)
        if values is not None:
            for length in range(len(path), -1, -1):
                if path[:length] in values:
                    return path[:length]
        return None


def fit_input(value: Value, name: str, member: ModelConfig) -> Tensor:
    """The tensor under the step's name, with or without the batch axis as the step's model wants it."""
    tensor = value.tensor
    assert tensor is not None, "bug: only tensors that exist are passed on"
    shape = tensor.shape
    if (member.max_batch_size > 0) != (value.batch_size > 0):
        dims = next((tuple(spec.dims) for spec in member.input if spec.name == name), ())
        shape = fit_shape(shape, dims, member.max_batch_size > 0, value.batch_size)
    return Tensor(name, tensor.datatype, shape, tensor.data)


def fit_output(value: Value, name: str, dims: tuple[int, ...], batch_size: int) -> Tensor:
    """The tensor as the ensemble's client wants it."""
    tensor = value.tensor
    assert tensor is not None, "bug: only tensors that exist are answered"
    shape = tensor.shape
    if (batch_size > 0) != (value.batch_size > 0):
        shape = fit_shape(shape, dims, batch_size > 0, value.batch_size)
    return Tensor(name, tensor.datatype, shape, tensor.data)


def fit_shape(shape: tuple[int, ...], dims: tuple[int, ...], batching: bool, rows: int) -> tuple[int, ...]:
    """`shape` for a reader whose dims (without batch axis) are these.

    A batching reader gets a batch axis of 1 in front unless there is one; for another one the batch axis is
    an ordinary axis if that fits, and is dropped if it is 1.
    """
    matches = len(shape) == len(dims) and all(d in (-1, size) for d, size in zip(dims, shape, strict=True))
    if batching:
        return (1, *shape) if matches else shape
    return shape[1:] if not matches and rows == 1 else shape
