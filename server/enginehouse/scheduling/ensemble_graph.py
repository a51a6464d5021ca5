"""The steps of an ensemble and the tensors between them. Pure: read from a config once, then only asked.

A step runs as soon as all tensors that it reads exist and its condition holds; a step that does not run
makes tensors that are missing, and so may steps behind it be. Only steps that a requested output depends on run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from enginehouse.config.conditions import Condition
from enginehouse.config.schema import ModelConfig, ModelEnsembling
from enginehouse.errors import InvalidArgument


@dataclass(frozen=True)
class Step:
    """One model in the graph. `inputs` maps its inputs to ensemble tensors, `outputs` its outputs."""

    index: int
    model_name: str
    model_version: str
    """"" is the latest."""
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    condition: Condition | None = None
    """The step runs only if it holds."""

    @cached_property
    def reads(self) -> frozenset[str]:
        """The tensors that it waits for."""
        asked: frozenset[str] = self.condition.tensor_names if self.condition is not None else frozenset()
        return asked.union(self.inputs.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """The part of a graph that makes certain outputs."""

    outputs: tuple[str, ...]
    """In the config's order."""
    consumers: Mapping[str, tuple[Step, ...]]
    """By tensor: the steps that run and wait for it."""
    num_readers: Mapping[str, int]
    """By tensor: those steps, and the client."""
    requested: Mapping[int, tuple[str, ...]]
    """By step: the outputs that somebody reads."""


class EnsembleGraph:
    """See module."""

    def __init__(
        self,
        name: str,
        steps: Sequence[Step],
        inputs: Sequence[str],
        outputs: Sequence[str],
        max_inflight_requests: int = 0,
    ) -> None:
        self.name = name
        self.steps = tuple(steps)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.max_inflight_requests = max_inflight_requests
        """How many requests of each step may be in flight at once, over all ensemble requests; 0 is any."""
        self.consumers: dict[str, list[Step]] = {}
        self.producers: dict[str, list[Step]] = {}
        for step in self.steps:
            for tensor in step.reads:
                self.consumers.setdefault(tensor, []).append(step)
            for tensor in set(step.outputs.values()):
                self.producers.setdefault(tensor, []).append(step)
        self._plans: dict[frozenset[str], Plan] = {}

    @classmethod
    def of(cls, config: ModelConfig) -> EnsembleGraph:
        """Raises InvalidArgument for a condition that can't be read."""
        ensembling = config.ensemble_scheduling
        steps = [
            Step(
                index,
                step.model_name,
                str(step.model_version) if step.model_version >= 0 else "",
                dict(step.input_map),
                dict(step.output_map),
                _condition_of(config.name, index, step),
            )
            for index, step in enumerate(ensembling.step)
        ]
        return cls(
            config.name,
            steps,
            [tensor.name for tensor in config.input],
            [tensor.name for tensor in config.output],
            ensembling.max_inflight_requests,
        )

    def plan(self, requested: Sequence[str]) -> Plan:
        """What to run for these outputs; none asks for all. Made once for each combination."""
        wanted = frozenset(requested) or frozenset(self.outputs)
        plan = self._plans.get(wanted)
        if plan is None:
            plan = self._plans[wanted] = self._make_plan(wanted)
        return plan

    def _make_plan(self, wanted: frozenset[str]) -> Plan:
        needed = self.needed_steps(wanted)
        consumers = {
            name: tuple(step for step in steps if step.index in needed) for name, steps in self.consumers.items()
        }
        num_readers = {name: len(steps) for name, steps in consumers.items()}
        for name in wanted:
            num_readers[name] = num_readers.get(name, 0) + 1
        requested = {
            step.index: tuple(name for name, tensor in step.outputs.items() if num_readers.get(tensor, 0))
            for step in self.steps
            if step.index in needed
        }
        outputs = tuple(name for name in self.outputs if name in wanted)
        return Plan(outputs, consumers, num_readers, requested)

    def steps_behind(self, step: Step) -> list[Step]:
        """The steps that can't run before this one has answered."""
        behind: dict[int, Step] = {}
        tensors = list(step.outputs.values())
        while tensors:
            for reader in self.consumers.get(tensors.pop(), ()):
                if reader.index not in behind:
                    behind[reader.index] = reader
                    tensors.extend(reader.outputs.values())
        return list(behind.values())

    def needed_steps(self, outputs: frozenset[str]) -> frozenset[int]:
        """Indices of the steps that these outputs depend on."""
        needed: set[int] = set()
        tensors = list(outputs)
        while tensors:
            for step in self.producers.get(tensors.pop(), ()):
                if step.index not in needed:
                    needed.add(step.index)
                    tensors.extend(step.reads)
        return frozenset(needed)


def _condition_of(ensemble: str, index: int, step: ModelEnsembling.Step) -> Condition | None:
    if not step.serving.when:
        return None
    try:
        return Condition(step.serving.when)
    except InvalidArgument as error:
        raise InvalidArgument(f"in ensemble {ensemble}, step {index} of model '{step.model_name}': {error}") from error
