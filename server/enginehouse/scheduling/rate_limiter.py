"""Whether an instance may run now, given the resources that instances of all models share.

Every instance names resources and counts; it runs while all of them are available. Waiting instances are
served by priority, then by how long they wait. No I/O and no clock here.
"""

from __future__ import annotations

from collections.abc import Callable

from enginehouse.execution.contract import InstanceHandle


class InstanceLimits:
    """What a scheduler sees of the rate limiter."""

    on_room: Callable[[], None]
    """Set by the scheduler: called when a refused instance could run now."""

    def acquire(self, instance: InstanceHandle) -> bool:
        """True if the instance may run a batch now; else `on_room` is called later."""
        raise NotImplementedError

    def release(self, instance: InstanceHandle) -> None:
        """The batch is done."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing more will be acquired."""


class Unlimited(InstanceLimits):
    """The rate limiter is off."""

    def acquire(self, instance: InstanceHandle) -> bool:
        return True

    def release(self, instance: InstanceHandle) -> None:
        pass
