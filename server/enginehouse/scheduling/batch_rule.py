"""Batch rules in Python: a function beside the model decides which waiting requests run together.

`serving { batching { rule: "module:function" } }` names a function in `<model folder>/module.py`:

    def function(waiting, max_rows):
        return [0, 2]        # positions of the requests to run now, or
        return 500           # look again in so many microseconds, or when another request arrives

`waiting` is a list of WaitingRequest in the order of service, never empty. The function runs on the server's
loop and must be quick. Positions that don't fit together (shape, rows) are an error of the rule: it is
logged, and the batch is made as if there were no rule.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, TypeAlias

from enginehouse.errors import InvalidArgument
from enginehouse.scheduling.dynamic_batching import Cut, DynamicBatching, Wait
from enginehouse.scheduling.queue import RequestQueue, Ticket
from enginehouse.types import InferRequest, ParameterValue, Tensor

logger = logging.getLogger("enginehouse.scheduling.batch_rule")

MAX_WINDOW = 256
"""How many waiting requests a rule sees."""


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """What a rule sees of a request."""

    request: InferRequest
    rows: int
    length: int
    """Along the axis that may be padded; 0 without one."""
    waited_us: int

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def parameters(self) -> Mapping[str, ParameterValue]:
        return self.request.parameters

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        return self.request.inputs


BatchRule: TypeAlias = Callable[[Sequence[WaitingRequest], int], Sequence[int] | int]


def load_rule(place: str, model_directory: Path | None) -> BatchRule:
    """Raises InvalidArgument if there is no such function."""
    module_name, colon, function_name = place.partition(":")
    path = (model_directory or Path()) / f"{module_name}.py"
    if not colon or not function_name:
        raise InvalidArgument(f"serving.batching.rule '{place}': expected \"module:function\"")
    spec = importlib.util.spec_from_file_location(f"enginehouse_batch_rule_{module_name}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InvalidArgument(f"serving.batching.rule '{place}': there is no file '{path}'")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise InvalidArgument(f"serving.batching.rule '{place}': {type(error).__name__}: {error}") from error
    rule: BatchRule | None = getattr(module, function_name, None)
    if not callable(rule):
        raise InvalidArgument(f"serving.batching.rule '{place}': '{path.name}' has no function '{function_name}'")
    return rule


@dataclass(slots=True)
class RuledBatching:
    """A policy that asks the rule."""

    learns: ClassVar[bool] = False
    rule: BatchRule
    place: str
    plain: DynamicBatching
    """Limits, and what is done when the rule fails."""
    _has_complained: bool = False

    def decide(self, queue: RequestQueue, now_ns: int) -> Cut | Wait | None:
        tickets = list(islice(queue, MAX_WINDOW))
        if not tickets:
            return None
        waiting = [
            WaitingRequest(one.request, one.rows, one.length, max(0, now_ns - one.queued_ns) // 1000) for one in tickets
        ]
        try:
            answer = self.rule(waiting, self.plain.max_rows)
            if isinstance(answer, int):
                return Wait(now_ns + 1000 * max(answer, 1), wake_rows=queue.num_rows + 1)
            return Cut(self._checked([tickets[position] for position in answer]))
        except Exception as error:  # the rule is the user's
            self._complain(error)
            return self.plain.decide(queue, now_ns)

    def learn(self, cut: Cut, seconds: float) -> None:
        """The rule learns by itself if it wants to."""

    def _checked(self, chosen: Sequence[Ticket]) -> Sequence[Ticket]:
        rows = sum(ticket.rows for ticket in chosen)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"returned {len(chosen)} positions, {len(set(chosen))} of them different")
        if len(chosen) > 1 and rows > self.plain.max_rows:
            raise ValueError(f"chose {rows} rows of at most {self.plain.max_rows}")
        if any(ticket.shape_key != chosen[0].shape_key for ticket in chosen):
            raise ValueError("chose requests whose shapes don't fit together")
        return chosen

    def _complain(self, error: Exception) -> None:
        if not self._has_complained:
            self._has_complained = True
            logger.error("batch rule '%s' failed, batching without it: %s: %s", self.place, type(error).__name__, error)
