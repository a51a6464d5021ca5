"""Which sequences run together on one instance. Pure: slots and time in, decision out.

`direct` gives every slot its fixed row of the batch: rows without a request are filled with null requests,
whose READY control is false. `oldest` lets the dynamic batcher choose among the next requests of the
sequences that hold a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enginehouse.config.schema import ModelConfig
from enginehouse.scheduling.dynamic_batching import DynamicBatching, Wait
from enginehouse.scheduling.sequence_book import SequenceRun

DEFAULT_IDLE_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Rows:
    """Run the first waiting request of each of these; None is a null request. The last is never None."""

    rows: Sequence[SequenceRun | None]


@dataclass(frozen=True, slots=True)
class DirectBatching:
    """See module."""

    num_slots: int
    delay_ns: int = 0
    minimum_utilization: float = 0.0
    """Share of the slots that must have a request for a batch to run before the delay is over."""

    @classmethod
    def of(cls, config: ModelConfig) -> DirectBatching:
        direct = config.sequence_batching.direct
        return cls(
            max(config.max_batch_size, 1),
            1000 * direct.max_queue_delay_microseconds,
            direct.minimum_slot_utilization,
        )

    def decide(self, slots: Sequence[SequenceRun | None], now_ns: int) -> Rows | Wait | None:
        """`slots` are the instance's, with the sequence that holds each. None if nothing waits."""
        waiting = [sequence for sequence in slots if sequence is not None and sequence.waiting]
        if not waiting:
            return None
        if self.delay_ns and self.minimum_utilization:
            due_ns = min(sequence.waiting[0].queued_ns for sequence in waiting) + self.delay_ns
            if now_ns < due_ns and len(waiting) / self.num_slots < self.minimum_utilization:
                return Wait(due_ns, wake_rows=len(waiting) + 1)
        shape_key = waiting[0].waiting[0].shape_key
        rows: list[SequenceRun | None] = []
        for sequence in slots:
            runs = sequence is not None and sequence.waiting and sequence.waiting[0].shape_key == shape_key
            rows.append(sequence if runs else None)
        while rows[-1] is None:
            rows.pop()
        return Rows(rows)


def oldest_batching(config: ModelConfig) -> DynamicBatching:
    oldest = config.sequence_batching.oldest
    return DynamicBatching(
        max(config.max_batch_size, 1),
        frozenset(oldest.preferred_batch_size),
        1000 * oldest.max_queue_delay_microseconds,
    )


def num_slots_of(config: ModelConfig) -> int:
    """How many sequences one instance serves at a time."""
    batching = config.sequence_batching
    if batching.HasField("oldest") and batching.oldest.max_candidate_sequences > 0:
        return batching.oldest.max_candidate_sequences
    return max(config.max_batch_size, 1)


def max_idle_ns_of(config: ModelConfig) -> int:
    return 1000 * (config.sequence_batching.max_sequence_idle_microseconds or DEFAULT_IDLE_US)
