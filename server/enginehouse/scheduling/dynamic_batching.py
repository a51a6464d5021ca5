"""Which waiting requests run together, and whether now or later. Pure: queue and time in, decision out.

Without a delay whatever waits is cut. With one, an incomplete batch is held until its oldest request has
waited for so long, it reaches a preferred size, or it can't grow any more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from enginehouse.config.schema import ModelConfig
from enginehouse.scheduling.queue import RequestQueue, Ticket
from enginehouse.types import InferRequest


@dataclass(frozen=True, slots=True)
class Cut:
    """Run these now, in this order."""

    tickets: Sequence[Ticket]
    size: int = 0
    """What the batch's time depends on, as the policy counts it."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing yet: ask again at `until_ns`, or earlier if the batch could grow enough."""

    until_ns: int
    wake_rows: int
    """As soon as so many rows wait …"""
    shape_key: Hashable = None
    """… or a request of another shape arrives."""


class BatchPolicy(Protocol):
    def decide(self, queue: RequestQueue, now_ns: int) -> Cut | Wait | None:
        """Asked while an instance is free. Does not change the queue. None only if it is empty."""
        ...

    learns: ClassVar[bool]

    def learn(self, cut: Cut, seconds: float) -> None:
        """What was cut took so long to run. Called if the policy `learns`."""
        ...


class SingleRequests:
    """Every request alone: models without dynamic batching."""

    learns: ClassVar[bool] = False

    def decide(self, queue: RequestQueue, now_ns: int) -> Cut | None:
        for ticket in queue:
            return Cut((ticket,))
        return None

    def learn(self, cut: Cut, seconds: float) -> None:
        """There is nothing to decide."""


@dataclass(frozen=True, slots=True)
class DynamicBatching:
    """Joins neighbours in the queue that have the same shape."""

    learns: ClassVar[bool] = False

    max_rows: int
    preferred_rows: frozenset[int] = frozenset()
    delay_ns: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> DynamicBatching:
        batching = config.dynamic_batching
        return cls(
            max(config.max_batch_size, 1),
            frozenset(batching.preferred_batch_size),
            1000 * batching.max_queue_delay_microseconds,
        )

    def decide(self, queue: RequestQueue, now_ns: int) -> Cut | Wait | None:
        chosen: list[Ticket] = []
        rows = 0
        num_preferred = 0
        complete = False
        largest_preferred = max(self.preferred_rows, default=self.max_rows)
        for ticket in queue:
            grown = rows + ticket.rows
            if chosen:
                if grown > largest_preferred and not num_preferred:
                    num_preferred = len(chosen)
                if grown > self.max_rows or ticket.shape_key != chosen[0].shape_key:
                    complete = True
                    break
            chosen.append(ticket)
            rows = grown
            if rows in self.preferred_rows:
                num_preferred = len(chosen)
            if rows >= self.max_rows:
                complete = True
                break
        if not chosen:
            return None
        due_ns = min(ticket.queued_ns for ticket in chosen) + self.delay_ns if self.delay_ns else now_ns
        overdue = self.delay_ns > 0 and now_ns >= due_ns
        if num_preferred and not overdue:
            return Cut(chosen[:num_preferred])
        if complete or now_ns >= due_ns or rows >= largest_preferred:
            return Cut(chosen)
        wake_rows = min((size for size in self.preferred_rows if size > rows), default=self.max_rows)
        return Wait(due_ns, wake_rows, chosen[0].shape_key)

    def learn(self, cut: Cut, seconds: float) -> None:
        """It does what it was told."""


def shape_key_of(
    config: ModelConfig, padded_axes: Mapping[str, int] | None = None
) -> Callable[[InferRequest], Hashable]:
    """What two requests must have in common to share a batch, as a function of a request.

    Sizes that the config fixes need no look. Optional inputs must be present in both or in neither; the
    values of shape tensors must be equal. Along `padded_axes` sizes may differ, but a request's padded
    inputs must agree among themselves, or it runs with its like.
    """
    padded = padded_axes or {}
    sized = [
        tensor.name
        for tensor in config.input
        if any(dim < 0 for dim in tensor.dims) and not (tensor.allow_ragged_batch or tensor.is_shape_tensor)
    ]
    plain = [name for name in sized if name not in padded]
    axes = [(name, padded[name]) for name in sized if name in padded]
    shape_tensors = [tensor.name for tensor in config.input if tensor.is_shape_tensor]
    optional = [tensor.name for tensor in config.input if tensor.optional]
    if not (sized or shape_tensors or optional):
        return lambda request: None

    def key(request: InferRequest) -> Hashable:
        inputs = request.inputs
        parts: list[Hashable] = [inputs[name].shape[1:] if name in inputs else None for name in plain]
        if axes:
            shapes = [(inputs[name].shape, axis) for name, axis in axes if name in inputs]
            parts.extend(shape[1:axis] + shape[axis + 1 :] for shape, axis in shapes)
            parts.append(len({shape[axis] for shape, axis in shapes}) <= 1)
        parts.extend(bytes(inputs[name].host_data()) if name in inputs else None for name in shape_tensors)
        parts.extend(name in inputs for name in optional)
        return tuple(parts)

    return key
