"""Which instance runs the next batch: the one with the fewest batches, then the one idle for longest.

No I/O and no clock here.
"""

from __future__ import annotations

from collections.abc import Sequence

from enginehouse.execution.contract import InstanceHandle


class _Seat:
    __slots__ = ("instance", "last_turn", "num_batches")

    def __init__(self, instance: InstanceHandle) -> None:
        self.instance = instance
        self.num_batches = 0
        self.last_turn = 0


class InstancePool:
    """The instances of one version and how many batches each holds."""

    def __init__(self, instances: Sequence[InstanceHandle] = ()) -> None:
        self._seats: dict[InstanceHandle, _Seat] = {}
        self._turn = 0
        self.set(instances)

    @property
    def instances(self) -> list[InstanceHandle]:
        return list(self._seats)

    def set(self, instances: Sequence[InstanceHandle]) -> None:
        """Batches that a departing instance still holds are released without effect."""
        self._seats = {instance: self._seats.get(instance) or _Seat(instance) for instance in instances}

    def all_free(self) -> list[InstanceHandle]:
        """In the order in which they would be reserved."""
        seats = [
            seat
            for seat in self._seats.values()
            if seat.num_batches < seat.instance.num_slots and seat.instance.available
        ]
        return [seat.instance for seat in sorted(seats, key=lambda seat: (seat.num_batches, seat.last_turn))]

    def free(self) -> InstanceHandle | None:
        """The instance that would be reserved now."""
        best: _Seat | None = None
        for seat in self._seats.values():
            instance = seat.instance
            if seat.num_batches >= instance.num_slots or not instance.available:
                continue
            if best is None or (seat.num_batches, seat.last_turn) < (best.num_batches, best.last_turn):
                best = seat
        return best.instance if best is not None else None

    def reserve(self, instance: InstanceHandle) -> None:
        seat = self._seats[instance]
        seat.num_batches += 1
        self._turn += 1
        seat.last_turn = self._turn

    def release(self, instance: InstanceHandle) -> None:
        seat = self._seats.get(instance)
        if seat is not None:
            seat.num_batches -= 1
            assert seat.num_batches >= 0, "bug: an instance is released as often as it is reserved"
