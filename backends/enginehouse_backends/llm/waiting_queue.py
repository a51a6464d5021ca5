"""In which order waiting generations are tried: by priority, then fairly between tenants, then by arrival.

Pure. A tenant's service is the tokens that it was given; the tenant with the least goes next. One that comes
back after a pause starts level with the others: what it didn't use is not saved up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from enginehouse.config.schema import ModelConfig
from enginehouse_backends.llm.generation import Generation


def tenant_weights(config: ModelConfig) -> dict[str, float]:
    """Shares of the model's tokens, by tenant."""
    return {tenant.name: tenant.weight or 1.0 for tenant in config.serving.tenants}


@dataclass(slots=True)
class WaitingQueue:
    """See module. `weights` by tenant; those that it doesn't name weigh what `*` does, or 1."""

    weights: dict[str, float] = field(default_factory=dict)
    _levels: dict[int, dict[str, dict[str, Generation]]] = field(default_factory=dict)
    """By priority, tenant, id; a tenant's are in order of arrival."""
    _service: dict[str, float] = field(default_factory=dict)
    _length: int = 0
    num_tokens: int = 0
    """Known tokens of all that wait."""

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Generation]:
        for tenants in self._levels.values():
            for waiting in tenants.values():
                yield from waiting.values()

    def add(self, generation: Generation) -> None:
        tenants = self._levels.setdefault(generation.priority, {})
        if generation.tenant not in tenants:
            self._level_up(generation.tenant)
            tenants[generation.tenant] = {}
        waiting = tenants[generation.tenant]
        assert generation.id not in waiting, f"bug: {generation.id} waits twice"
        waiting[generation.id] = generation
        if len(waiting) > 1 and generation.num_preemptions:
            # back to where its arrival puts it: before those who came later
            tenants[generation.tenant] = dict(sorted(waiting.items(), key=lambda item: item[1].arrival))
        self._length += 1
        self.num_tokens += len(generation.tokens)

    def remove(self, generation: Generation) -> None:
        tenants = self._levels[generation.priority]
        del tenants[generation.tenant][generation.id]
        if not tenants[generation.tenant]:
            del tenants[generation.tenant]
        if not tenants:
            del self._levels[generation.priority]
        self._length -= 1
        if not self._length:
            self._service.clear()  # nobody competes; and names of tenants must not pile up
        self.num_tokens -= len(generation.tokens)

    def charge(self, tenant: str, num_tokens: int) -> None:
        self._service[tenant] = self._service.get(tenant, 0.0) + num_tokens / self._weight(tenant)

    def _weight(self, tenant: str) -> float:
        return self.weights.get(tenant) or self.weights.get("*", 1.0)

    def best_priority(self) -> int | None:
        return min(self._levels, default=None)

    def in_order(self) -> Iterator[Generation]:
        """Each waiting generation once, best first. The last one given may be removed meanwhile."""
        for priority in sorted(self._levels):
            yield from self._fairly(self._levels[priority])

    def _fairly(self, tenants: dict[str, dict[str, Generation]]) -> Iterator[Generation]:
        if len(tenants) == 1:
            yield from list(next(iter(tenants.values())).values())
            return
        heap = [
            (self._service.get(tenant, 0.0), tenant, iter(list(waiting.values())))
            for tenant, waiting in tenants.items()
        ]
        heapq.heapify(heap)
        while heap:
            _, tenant, rest = heapq.heappop(heap)
            generation = next(rest, None)
            if generation is None:
                continue
            yield generation
            heapq.heappush(heap, (self._service.get(tenant, 0.0), tenant, rest))

    def _level_up(self, tenant: str) -> None:
        waiting = {name for tenants in self._levels.values() for name in tenants if name != tenant}
        floor = min((self._service.get(name, 0.0) for name in waiting), default=0.0)
        self._service[tenant] = max(self._service.get(tenant, 0.0), floor)
