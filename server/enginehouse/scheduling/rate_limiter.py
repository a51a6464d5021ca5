"""Whether an instance may run now, given the resources that the instances of all models share.

An instance group names resources and counts; a batch runs while all of them are available. Of those that
wait, the one goes first whose executions times its `priority` are fewest, so a group of priority 2 gets half
as many turns as one of priority 1; one that waits for a resource blocks it for those after it. Without limits
on the command line there is as much of each as the most demanding instance needs. No I/O and no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import InvalidArgument
from enginehouse.execution.contract import InstanceHandle

GLOBAL = -2
ANY_DEVICE = -1

Resource: TypeAlias = tuple[str, int]
"""A name, and the device that has it or GLOBAL."""


@dataclass(eq=False, slots=True)
class _Claim:
    """What one instance needs, and whether it holds or wants it."""

    needs: Mapping[Resource, int]
    priority: int
    limits: InstanceLimits
    num_executions: int = 0
    num_held: int = 0
    """Batches that run with its resources."""
    arrival: int = 0
    is_waiting: bool = False
    is_granted: bool = False
    """Its resources are set aside for the batch that it was promised."""

    @property
    def turn(self) -> tuple[int, int]:
        return self.num_executions * self.priority, self.arrival


@dataclass(eq=False)
class InstanceLimits:
    """What one scheduler sees of the rate limiter."""

    _limiter: RateLimiter
    _config: ModelConfig
    on_room: Callable[[], None] = lambda: None
    """Set by the scheduler: called when an instance that was refused may run."""
    _claims: dict[InstanceHandle, _Claim] = field(default_factory=dict)
    _is_closed: bool = False

    def set_instances(self, instances: Sequence[InstanceHandle]) -> None:
        """Raises InvalidArgument if one of them could never run."""
        if self._is_closed:
            return
        claims = {}
        for instance in instances:
            claim = self._claims.get(instance)
            claims[instance] = claim or _Claim(*_needs_of(self._config, instance), self)
        self._limiter.replace(list(self._claims.values()), list(claims.values()))
        departed = {instance: claim for instance, claim in self._claims.items() if claim.num_held}
        self._claims = departed | claims

    def acquire_one(self, instances: Sequence[InstanceHandle]) -> InstanceHandle | None:
        """The instance that may run a batch now; None if `on_room` is called later instead."""
        in_turn = sorted(instances, key=lambda one: (not self._claims[one].is_granted, self._claims[one].turn))
        return next((one for one in in_turn if self._limiter.acquire(self._claims[one])), None)

    def release(self, instance: InstanceHandle) -> None:
        """The batch is done."""
        self._limiter.release(self._claims[instance])

    def close(self) -> None:
        """Nothing more will be acquired; what still runs is given back as usual."""
        self._is_closed = True
        self.on_room = lambda: None
        self._limiter.leave(list(self._claims.values()))


class RateLimiter:
    """One per server. `limits` are those of the command line, by name and device (or ANY_DEVICE)."""

    def __init__(self, limits: Mapping[Resource, int] | None = None) -> None:
        self._explicit = dict(limits or {})
        self._claims: list[_Claim] = []
        self._used: dict[Resource, int] = {}
        self._num_arrivals = 0

    def limits_of(self, config: ModelConfig, instances: Sequence[InstanceHandle]) -> InstanceLimits:
        """Raises InvalidArgument if an instance could never run."""
        limits = InstanceLimits(self, config)
        limits.set_instances(instances)
        return limits

    def replace(self, old: Sequence[_Claim], new: Sequence[_Claim]) -> None:
        others = [claim for claim in self._claims if claim not in old]
        self._check(new, others)
        for claim in old:
            claim.is_waiting = claim.is_waiting and claim in new
        self._claims = [*others, *new]

    def leave(self, claims: Sequence[_Claim]) -> None:
        self.replace(claims, [])
        self._grant_in_turn()

    def acquire(self, claim: _Claim) -> bool:
        if claim.is_granted:
            claim.is_granted = False
            claim.num_executions += 1
            claim.num_held += 1
            return True
        if not claim.is_waiting:
            self._num_arrivals += 1
            claim.arrival = self._num_arrivals
            claim.is_waiting = True
        blocked: set[Resource] = set()
        for waiting in self._queue():
            if waiting is claim:
                break
            blocked.update(waiting.needs)
        if blocked & claim.needs.keys() or not self._fits(claim):
            return False
        claim.is_waiting = False
        claim.num_executions += 1
        claim.num_held += 1
        self._take(claim)
        return True

    def release(self, claim: _Claim) -> None:
        claim.num_held -= 1
        self._give_back(claim)
        self._grant_in_turn()

    def available(self, resource: Resource) -> int:
        return self.limit_of(resource) - self._used.get(resource, 0)

    def limit_of(self, resource: Resource) -> int:
        explicit = self._explicit_limit(resource)
        if explicit is not None:
            return explicit
        return max((claim.needs.get(resource, 0) for claim in self._claims), default=0)

    def _explicit_limit(self, resource: Resource) -> int | None:
        """None if the command line names no resources; then there is nothing of those that it doesn't name."""
        if not self._explicit:
            return None
        return self._explicit.get(resource, self._explicit.get((resource[0], ANY_DEVICE), 0))

    # --- granting

    def _grant_in_turn(self) -> None:
        while (waiting := self._next_in_turn()) is not None:
            self._grant(waiting)

    def _queue(self) -> list[_Claim]:
        return sorted((claim for claim in self._claims if claim.is_waiting), key=lambda claim: claim.turn)

    def _next_in_turn(self) -> _Claim | None:
        """The first that waits and can have what it needs without taking from one before it."""
        blocked: set[Resource] = set()
        for claim in self._queue():
            if not blocked & claim.needs.keys() and self._fits(claim):
                return claim
            blocked.update(claim.needs)
        return None

    def _grant(self, claim: _Claim) -> None:
        """Sets its resources aside and tells its scheduler, which may have nothing to run any more."""
        self._take(claim)
        claim.is_waiting, claim.is_granted = False, True
        claim.limits.on_room()
        if claim.is_granted:
            claim.is_granted = False
            self._give_back(claim)

    def _fits(self, claim: _Claim) -> bool:
        return all(count <= self.available(resource) for resource, count in claim.needs.items())

    def _take(self, claim: _Claim) -> None:
        for resource, count in claim.needs.items():
            self._used[resource] = self._used.get(resource, 0) + count

    def _give_back(self, claim: _Claim) -> None:
        for resource, count in claim.needs.items():
            self._used[resource] -= count
            assert self._used[resource] >= 0, "bug: a resource is given back as often as it is taken"

    # --- checking

    def _check(self, new: Sequence[_Claim], others: Sequence[_Claim]) -> None:
        for claim in new:
            for name, device in claim.needs:
                for other in (*others, *new):
                    if any(n == name and (d == GLOBAL) != (device == GLOBAL) for n, d in other.needs):
                        raise InvalidArgument(
                            f'Resource "{name}" is present as both global and device-specific resource in the '
                            f"model configuration."
                        )
            for (name, device), count in claim.needs.items():
                limit = self._explicit_limit((name, device))
                if limit is not None and limit < count:
                    raise InvalidArgument(
                        f'Resource count for "{name}" is limited to {limit} which will prevent scheduling of one '
                        f"or more model instances, the minimum required count is {count}"
                    )


def _needs_of(config: ModelConfig, instance: InstanceHandle) -> tuple[dict[Resource, int], int]:
    """The resources of the instance's group on its device, and the group's priority."""
    if instance.group >= len(config.instance_group):
        return {}, 1
    limiter = config.instance_group[instance.group].rate_limiter
    device = device_number(instance.device)
    needs: dict[Resource, int] = {}
    for resource in limiter.resources:
        key = (resource.name, GLOBAL if getattr(resource, "global") else device)
        needs[key] = needs.get(key, 0) + resource.count
    return needs, max(limiter.priority, 1)


def device_number(device: str) -> int:
    """N of "cuda:N"; 0 for what has no number, as --rate-limit-resource counts the CPU."""
    _, _, number = device.partition(":")
    return int(number) if number.isdigit() else 0
