"""A scheduler in front of another: answers from the response cache what it can, and remembers the rest.

Answers of models that stream, and errors, are never remembered. With `preserve_ordering` cached answers
wait for those of older requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence

from enginehouse.errors import EnginehouseError
from enginehouse.execution.contract import InstanceHandle
from enginehouse.scheduling.caches import RemoteCache
from enginehouse.scheduling.clock import Clock
from enginehouse.scheduling.contract import ExecutionObserver, Refusal, Scheduler
from enginehouse.scheduling.in_flight import cancelled, stopped
from enginehouse.scheduling.ordering import ResponseOrder
from enginehouse.scheduling.response_cache import CacheEntry, LocalCache, ResponseCache, cache_key
from enginehouse.scheduling.tuning import Tuning
from enginehouse.scheduling.tuning_report import tuning_of
from enginehouse.types import InferRequest, InferResponse, ResponseSink


class CachingScheduler:
    """The contract's Scheduler."""

    def __init__(
        self,
        inner: Scheduler,
        cache: ResponseCache,
        observer: ExecutionObserver,
        clock: Clock,
        *,
        model_name: str,
        version: int,
        fingerprint: str = "",
        preserves_order: bool = False,
    ) -> None:
        self._inner = inner
        self._cache = cache
        self._observer = observer
        self._clock = clock
        self._model_name = model_name
        self._version = version
        self._fingerprint = fingerprint
        self._sinks: dict[InferRequest, ResponseSink] = {}
        """Where the answers of requests go that are not finally answered."""
        self._num_held = 0
        """Requests that the scheduler behind does not have (yet)."""
        self._nothing_held = asyncio.Event()
        self._nothing_held.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._order = ResponseOrder(self._send) if preserves_order else None
        self._is_closed = False

    # --- the contract

    @property
    def num_pending(self) -> int:
        return self._inner.num_pending

    @property
    def num_in_flight(self) -> int:
        return self._inner.num_in_flight + self._num_held

    @property
    def num_sequences(self) -> int:
        return 0

    def submit(self, request: InferRequest) -> None:
        if self._is_closed:
            raise stopped(request)
        if request.cancelled:
            raise cancelled()
        request.times.queued_ns = self._clock.now_ns()
        key = cache_key(self._model_name, self._version, request, self._fingerprint)
        if isinstance(self._cache, RemoteCache):
            self._hold(request)
            self._start(self._serve(request, key, self._cache))
            return
        assert isinstance(self._cache, LocalCache), "bug: a cache is local or remote"
        entry = self._cache.get(key)
        lookup_ns = self._count_lookup(request, entry)
        if entry is not None and entry.answers(request.requested_outputs):
            self._hold(request)
            # later: nobody expects the answer before `submit` has returned
            self._clock.call_soon(lambda: self._answer(request, entry, lookup_ns))
        else:
            self._pass_on(request, key, lookup_ns)
            if self._order is not None:
                self._order.open(request)

    @property
    def tuning(self) -> Tuning | None:
        return tuning_of(self._inner)

    def set_instances(self, instances: Sequence[InstanceHandle]) -> None:
        self._inner.set_instances(instances)

    async def drain(self) -> None:
        await self._nothing_held.wait()
        await self._inner.drain()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def close(self, refusal: Refusal = stopped) -> None:
        """Requests whose lookup is under way are refused when it ends."""
        self._is_closed = True
        self._inner.close(refusal)

    # --- looking up

    def _count_lookup(self, request: InferRequest, entry: CacheEntry | None) -> int:
        counts = self._cache.counts
        lookup_ns = self._clock.now_ns() - request.times.queued_ns
        is_hit = entry is not None and entry.answers(request.requested_outputs)
        counts.num_lookups += 1
        counts.lookup_ns += lookup_ns
        counts.num_hits += is_hit
        counts.num_misses += not is_hit
        return lookup_ns

    def _hold(self, request: InferRequest) -> None:
        assert request.sink is not None, "bug: a submitted request has a sink"
        self._sinks[request] = request.sink
        self._num_held += 1
        self._nothing_held.clear()
        if self._order is not None:
            self._order.open(request)

    def _let_go(self) -> None:
        self._num_held -= 1
        if not self._num_held:
            self._nothing_held.set()

    async def _serve(self, request: InferRequest, key: bytes, cache: RemoteCache) -> None:
        entry = await cache.get(key)
        lookup_ns = self._count_lookup(request, entry)
        if request.cancelled:
            self._let_go()
            self._respond(request, InferResponse(error=cancelled()))
        elif entry is not None and entry.answers(request.requested_outputs):
            self._answer(request, entry, lookup_ns)
        else:
            request.sink = self._sinks[request]
            try:
                self._pass_on(request, key, lookup_ns)
            except EnginehouseError as error:
                self._respond(request, InferResponse(error=error))
            self._let_go()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- answering

    def _answer(self, request: InferRequest, entry: CacheEntry, lookup_ns: int) -> None:
        """From the cache."""
        self._observer.on_cache_hit(request, lookup_ns)
        self._let_go()
        response = InferResponse(
            entry.outputs, model_name=self._model_name, model_version=str(self._version), id=request.id
        )
        self._respond(request, response)

    def _pass_on(self, request: InferRequest, key: bytes, lookup_ns: int) -> None:
        """To the scheduler behind, whose answer comes here first. Raises what that one raises."""
        sink = request.sink
        assert sink is not None, "bug: a submitted request has a sink"
        request.sink = lambda response: self._remember(request, key, lookup_ns, response)
        try:
            self._inner.submit(request)
        except EnginehouseError:
            request.sink = sink
            raise
        self._sinks[request] = sink

    def _remember(self, request: InferRequest, key: bytes, lookup_ns: int, response: InferResponse) -> None:
        if response.final and response.has_response and response.error is None:
            before_ns = self._clock.now_ns()
            entry = CacheEntry.of(response.outputs, not request.requested_outputs)
            if isinstance(self._cache, RemoteCache):
                self._start(self._cache.put(key, entry))
            elif isinstance(self._cache, LocalCache):
                self._cache.put(key, entry)
            insert_ns = self._clock.now_ns() - before_ns
            self._cache.counts.insertion_ns += insert_ns
            self._observer.on_cache_miss(request, lookup_ns, insert_ns)
        self._respond(request, response)

    def _respond(self, request: InferRequest, response: InferResponse) -> None:
        if self._order is not None:
            self._order.respond(request, response)
        else:
            self._send(request, response)

    def _send(self, request: InferRequest, response: InferResponse) -> None:
        sink = self._sinks.pop(request) if response.final else self._sinks[request]
        sink(response)
