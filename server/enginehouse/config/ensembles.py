"""Whether an ensemble's own graph is whole: steps complete, tensors connected, nothing unused.

Texts and order are Triton's. Needs the ensemble's config alone; whether it fits its models is checked when
they are loaded (scheduling/ensemble_check.py). No I/O here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from enginehouse.config.conditions import Condition
from enginehouse.config.problems import Problem
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument


@dataclass(slots=True)
class _Tensor:
    """A node of the ensemble's graph. `before` are the tensors that its step needs."""

    name: str
    is_output: bool = False
    is_conditional: bool = False
    """The steps that make it have conditions, so that several may."""
    is_ready: bool = False
    before: list[_Tensor] = field(default_factory=list)
    after: list[_Tensor] = field(default_factory=list)


def check_ensemble_structure(config: ModelConfig) -> Iterator[Problem]:
    name = config.name
    if config.platform != "ensemble":
        yield Problem(
            f"ensemble scheduling cannot be set for model '{name}' whose platform is not ensemble", "platform"
        )
    if config.instance_group:
        yield Problem(f"instance group should not be specified for ensemble '{name}'", "instance_group")
    if config.HasField("optimization"):
        yield Problem(f"optimization should not be specified for ensemble '{name}'", "optimization")
    if config.model_warmup:
        yield Problem(f"model_warmup can not be specified for ensemble '{name}'", "model_warmup")
    if not config.ensemble_scheduling.step:
        yield Problem(f"must specify 'step' for ensemble '{name}'", "ensemble_scheduling")
        return
    tensors: dict[str, _Tensor] = {}
    step_problems = list(_connect(config, tensors))
    yield from step_problems
    if not step_problems:
        yield from _check_flow(config, tensors)


def _connect(config: ModelConfig, tensors: dict[str, _Tensor]) -> Iterator[Problem]:
    for index, step in enumerate(config.ensemble_scheduling.step):
        place = f"ensemble_scheduling.step[{index}]"
        missing = [key for key in ("model_name", "input_map", "output_map") if not getattr(step, key)]
        if missing:
            yield Problem(f"must specify '{missing[0]}' in step {index} of ensemble '{config.name}'", place)
            continue
        produced = []
        for key in sorted(step.output_map):
            tensor = tensors.setdefault(step.output_map[key], _Tensor(step.output_map[key]))
            if tensor.is_output and not (step.serving.when and tensor.is_conditional):
                yield Problem(
                    f"ensemble tensor '{tensor.name}' can appear in an output map only once for ensemble "
                    f"'{config.name}' step {index}",
                    f'{place}.output_map["{key}"]',
                )
            tensor.is_output, tensor.is_conditional = True, bool(step.serving.when)
            produced.append(tensor)
        try:
            asked = Condition(step.serving.when).tensor_names if step.serving.when else frozenset[str]()
        except InvalidArgument as error:
            yield Problem(str(error), f"{place}.serving.when")
            continue
        read = [step.input_map[key] for key in sorted(step.input_map)]
        for name in (*read, *sorted(asked.difference(read))):
            source = tensors.setdefault(name, _Tensor(name))
            for tensor in produced:
                tensor.before.append(source)
                source.after.append(tensor)


def _check_flow(config: ModelConfig, tensors: dict[str, _Tensor]) -> Iterator[Problem]:
    name = config.name
    waiting: deque[_Tensor] = deque()
    for index, tensor in enumerate(config.input):
        if tensor.name not in tensors:
            yield Problem(f"ensemble input '{tensor.name}' for ensemble {name}' is not used", f"input[{index}]")
            continue
        if tensors[tensor.name].is_output:  # Triton loads it, and never answers
            yield Problem(
                f"ensemble tensor '{tensor.name}' is an input of ensemble '{name}' and made by a step too: one of them "
                f"needs another name",
                f"input[{index}]",
            )
        tensors[tensor.name].is_ready = True
        waiting.append(tensors[tensor.name])
    while waiting:
        for follower in waiting.popleft().after:
            if not follower.is_ready and all(source.is_ready for source in follower.before):
                follower.is_ready = True
                waiting.append(follower)
    for index, output in enumerate(config.output):
        if output.name not in tensors:
            yield Problem(f"ensemble output '{output.name}' for ensemble {name}' is not used", f"output[{index}]")
        elif not tensors[output.name].is_ready:
            yield Problem(_not_written(config, tensors[output.name]), f"output[{index}]")
    outputs = {output.name for output in config.output}
    for tensor_name, node in tensors.items():
        if tensor_name not in outputs and (not node.is_ready or not node.after):
            yield Problem(f"ensemble tensor '{tensor_name}' is unused in ensemble '{name}'", "ensemble_scheduling")


def _not_written(config: ModelConfig, output: _Tensor) -> str:
    """Follows one unready source after the other, to the tensor that nothing makes."""
    text = f"output '{output.name}' for ensemble '{config.name}' is not written"
    culprit, seen = output, {output.name}
    while True:
        source = next((node for node in culprit.before if not node.is_ready and node.name not in seen), None)
        if source is None:
            break
        seen.add(source.name)
        culprit = source
    if culprit is not output:
        text += f": at least one of its depending tensors, '{culprit.name}', is not connected"
    return text
