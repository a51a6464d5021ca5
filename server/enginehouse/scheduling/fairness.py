"""A queue in which tenants share the model's time by weight. Pure, like the queue that it is.

Inside a level the next request is one of the tenant that was served least: each is charged the cost of what
was cut for it (rows, or tokens) over its weight. It is deficit round robin with the smallest quantum. Who
comes back after a pause starts level with the others: time unused is not saved up.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from enginehouse.config.schema import ModelServing
from enginehouse.errors import FailureReason, Unavailable
from enginehouse.scheduling.queue import QueuePolicy, RequestQueue, Ticket
from enginehouse.types import InferRequest

EVERYONE_ELSE = "*"


@dataclass(eq=False, slots=True)
class Tenant:
    """One who shares. Requests of tenants that the config doesn't name are those of `*`."""

    name: str
    weight: float = 1.0
    max_waiting: int = 0
    max_in_work: int = 0
    priority: int = 0
    charged: float = 0.0
    """Cost of what was cut for it over its weight, on the clock that all share."""
    num_waiting: int = 0
    num_in_work: int = 0
    lines: dict[object, deque[Ticket]] = field(default_factory=dict)
    """Its waiting tickets by level, oldest first; some may be gone."""

    @classmethod
    def of(cls, config: ModelServing.Tenant) -> Tenant:
        return cls(config.name, config.weight or 1.0, config.max_queue_size, config.max_inflight, config.priority)


class FairQueue(RequestQueue):
    """See module."""

    def __init__(
        self, tenants: Iterable[Tenant], policies: Sequence[QueuePolicy] = (QueuePolicy(),), default_level: int = 0
    ) -> None:
        super().__init__(policies, default_level)
        self._tenants = {tenant.name: tenant for tenant in tenants}
        self._tenants.setdefault(EVERYONE_ELSE, Tenant(EVERYONE_ELSE))
        self._now = 0.0
        """What the tenant that was served last had been charged."""
        self._in_work: dict[InferRequest, Tenant] = {}

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        return self._tenants

    def tenant_of(self, request: InferRequest) -> Tenant:
        return self._tenants.get(request.tenant) or self._tenants[EVERYONE_ELSE]

    def add(self, ticket: Ticket) -> None:
        tenant = self.tenant_of(ticket.request)
        if 0 < tenant.max_waiting <= tenant.num_waiting:
            raise Unavailable(
                f"[request id: {ticket.request.id or '<id_unknown>'}] Exceeds maximum queue size of tenant "
                f"'{tenant.name}'",
                reason=FailureReason.REJECTED,
            )
        if not ticket.request.priority:
            ticket.request.priority = tenant.priority
        super().add(ticket)
        if not tenant.num_waiting:
            tenant.charged = max(tenant.charged, self._now)
        tenant.num_waiting += 1
        tenant.lines.setdefault(ticket.level, deque()).append(ticket)

    def __iter__(self) -> Iterator[Ticket]:
        in_work = {tenant: tenant.num_in_work for tenant in self._tenants.values()}
        for level in self._levels:
            if level.num_waiting:
                yield from self._merged(level, in_work)
                for ticket in level.late:
                    tenant = self.tenant_of(ticket.request)
                    if not ticket.gone and self._has_room(tenant, in_work):
                        in_work[tenant] += 1
                        yield ticket

    def _merged(self, level: object, in_work: dict[Tenant, int]) -> Iterator[Ticket]:
        """The level's tickets as if each were cut as soon as it is given out."""
        turns: list[tuple[float, int, Tenant, Iterator[Ticket]]] = []
        for number, tenant in enumerate(self._tenants.values()):
            line = tenant.lines.get(level)
            if line:
                turns.append((tenant.charged, number, tenant, iter(line)))
        heapq.heapify(turns)
        while turns:
            charged, number, tenant, rest = heapq.heappop(turns)
            ticket = next((one for one in rest if not (one.gone or one.is_late)), None)
            if ticket is None or not self._has_room(tenant, in_work):
                continue
            in_work[tenant] += 1
            yield ticket
            heapq.heappush(turns, (charged + cost_of(ticket) / tenant.weight, number, tenant, rest))

    @staticmethod
    def _has_room(tenant: Tenant, in_work: Mapping[Tenant, int]) -> bool:
        return not 0 < tenant.max_in_work <= in_work[tenant]

    def take(self, tickets: Iterable[Ticket]) -> None:
        tickets = list(tickets)
        super().take(tickets)
        for ticket in tickets:
            tenant = self.tenant_of(ticket.request)
            tenant.num_waiting -= 1
            line = tenant.lines[ticket.level]
            while line and (line[0].gone or line[0].is_late):
                line.popleft()
            if len(line) > 2 * tenant.num_waiting + 64:
                tenant.lines[ticket.level] = deque(one for one in line if not (one.gone or one.is_late))

    def cut(self, tickets: Iterable[Ticket]) -> None:
        tickets = list(tickets)
        self.take(tickets)
        for ticket in tickets:
            tenant = self.tenant_of(ticket.request)
            self._now = max(self._now, tenant.charged)
            tenant.charged += cost_of(ticket) / tenant.weight
            tenant.num_in_work += 1
            self._in_work[ticket.request] = tenant

    def finished(self, request: InferRequest) -> None:
        tenant = self._in_work.pop(request, None)
        if tenant is not None:
            tenant.num_in_work -= 1


def cost_of(ticket: Ticket) -> int:
    """Tokens where lengths are known, else rows."""
    return ticket.rows * max(ticket.length, 1)
