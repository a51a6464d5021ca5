"""How sequences are batched, and the slots of the instances that they run in. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from enginehouse.execution.contract import InstanceHandle
from enginehouse.scheduling.dynamic_batching import DynamicBatching, Wait
from enginehouse.scheduling.queue import RequestQueue
from enginehouse.scheduling.sequence_batching import DirectBatching
from enginehouse.scheduling.sequence_book import SequenceRun
from enginehouse.scheduling.sequence_requests import SequenceRequests
from enginehouse.scheduling.test_hooks import SequenceHold


@dataclass
class SequenceOptions:
    """How one version's sequences are batched."""

    batching: DirectBatching | DynamicBatching
    """DynamicBatching stands for the strategy `oldest`."""
    requests: SequenceRequests
    num_slots: int
    max_idle_ns: int
    preserves_order: bool = False
    is_iterative: bool = False
    hold: SequenceHold = field(default_factory=SequenceHold)
    max_waiting: int = 100_000


@dataclass(eq=False)
class InstanceLane:
    """The slots of one instance, and what is on its way there."""

    index: int
    instance: InstanceHandle
    slots: list[SequenceRun | None]
    ready: RequestQueue = field(default_factory=RequestQueue)
    """`oldest` only: the next request of each sequence that is not running."""
    num_batches: int = 0
    is_retired: bool = False
    is_due: bool = False
    wait: Wait | None = None
