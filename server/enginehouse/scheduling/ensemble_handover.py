"""Which outputs of an ensemble's steps stay where they were made, because all their readers live there too.

An output that the client wants, that a condition reads, or that some reader needs elsewhere goes through the
server as ever. Whether two models share a process is asked anew for each request: models come and go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from enginehouse.scheduling.ensemble_graph import Plan, Step

End: TypeAlias = tuple[str, str, str]
"""Model, version ("" is the default one), and the name of its input or output."""
HandsOver: TypeAlias = Callable[[End, End], bool]
"""Whether this output may be left for this input in the process of both models."""


def kept_outputs(step: Step, plan: Plan, hands_over: HandsOver) -> frozenset[str]:
    """Names of the step's own outputs."""
    return frozenset(
        output
        for output, tensor in step.outputs.items()
        if tensor not in plan.outputs and _all_read_there(step, output, tensor, plan, hands_over)
    )


def _all_read_there(step: Step, output: str, tensor: str, plan: Plan, hands_over: HandsOver) -> bool:
    readers = plan.consumers.get(tensor, ())
    giver = (step.model_name, step.model_version, output)
    for reader in readers:
        if reader.condition is not None and tensor in reader.condition.tensor_names:
            return False
        names = [name for name, read in reader.inputs.items() if read == tensor]
        if not all(hands_over(giver, (reader.model_name, reader.model_version, name)) for name in names):
            return False
    return bool(readers)
