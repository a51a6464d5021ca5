"""The steps of an ensemble and the tensors between them. Pure: read from a config once, then only asked.

A step runs as soon as all tensors that it reads exist and its condition holds; a step that does not run
makes tensors that are missing, and so may steps behind it be. Only steps that a requested output depends on run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from enginehouse.config.conditions import Condition
from enginehouse.config.schema import ModelConfig, ModelEnsembling
from enginehouse.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
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

    @property
    def reads(self) -> frozenset[str]:
        """The tensors that it waits for."""
        asked: frozenset[str] = self.condition.tensor_names if self.condition is not None else frozenset()
        return asked.union(self.inputs.values())


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
        self._needed: dict[frozenset[str], frozenset[int]] = {}

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

    def needed_steps(self, outputs: frozenset[str]) -> frozenset[int]:
        """Indices of the steps that these outputs depend on."""
        known = self._needed.get(outputs)
        if known is not None:
            return known
        needed: set[int] = set()
        tensors = list(outputs)
        while tensors:
            for step in self.producers.get(tensors.pop(), ()):
                if step.index not in needed:
                    needed.add(step.index)
                    tensors.extend(step.reads)
        self._needed[outputs] = frozenset(needed)
        return self._needed[outputs]


def _condition_of(ensemble: str, index: int, step: ModelEnsembling.Step) -> Condition | None:
    if not step.serving.when:
        return None
    try:
        return Condition(step.serving.when)
    except InvalidArgument as error:
        raise InvalidArgument(f"in ensemble {ensemble}, step {index} of model '{step.model_name}': {error}") from error
