"""The console: a page that shows what the server does right now, and lets a human try a model.

One static file and one stream of snapshots; everything else the page does goes over the v2 protocol. A
snapshot holds counts since a version's load; the page makes rates of two of them, so that nothing is kept here.
Served at /console, and at / to browsers alone: other clients find nothing there, as with Triton.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson

from enginehouse.core import Core
from enginehouse.frontends.http_message import EVENTS, NOT_FOUND, HttpRequest, HttpResponse, HttpStream, Reply
from enginehouse.frontends.http_routes import PathParts, Route
from enginehouse.frontends.restricted_apis import Api
from enginehouse.observe.model_families import ModelSeries

INTERVAL_S = 1.0
_ANY_METHOD = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
_PAGE = Path(__file__).with_name("console.html")
_GAUGES = (
    "enginehouse_memory_total_bytes",
    "enginehouse_memory_limit_bytes",
    "enginehouse_memory_bytes",
    "enginehouse_host_restarts",
    "nv_cpu_utilization",
    "nv_cpu_memory_total_bytes",
    "nv_cpu_memory_used_bytes",
    "nv_gpu_utilization",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_memory_used_bytes",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:generation_tokens",
)


class Console:
    """Its routes, for the router of the HTTP port."""

    def __init__(self, core: Core, interval_s: float = INTERVAL_S) -> None:
        self._core = core
        self._interval_s = interval_s
        page = _PAGE.read_text()
        headers = (("Content-Security-Policy", _policy(page)), ("Cache-Control", "no-cache"))
        self._page = HttpResponse(200, "text/html; charset=utf-8", (page.encode(),), headers)

    def routes(self) -> list[Route]:
        return [
            Route("/", _ANY_METHOD, None, self._root),
            Route("/console", ("GET",), None, self._whole_page),
            Route("/console/events", ("GET",), Api.STATISTICS, self._events),
        ]

    async def _root(self, http: HttpRequest, parts: PathParts) -> Reply:
        from_browser = http.method == "GET" and "text/html" in (http.headers.get("accept") or "")
        return self._page if from_browser else NOT_FOUND

    async def _whole_page(self, http: HttpRequest, parts: PathParts) -> Reply:
        return self._page

    async def _events(self, http: HttpRequest, parts: PathParts) -> Reply:
        return HttpStream(200, EVENTS, self._snapshots(), (("Cache-Control", "no-store"),))

    async def _snapshots(self) -> AsyncIterator[bytes]:
        while not self._core.draining:
            yield b"data: " + orjson.dumps(await self.snapshot()) + b"\n\n"
            await asyncio.sleep(self._interval_s)

    async def snapshot(self) -> dict[str, Any]:
        """What the page shows, as it is now."""
        core = self._core
        series = {(each.statistics.name, each.statistics.version): each for each in core.metrics.models()}
        return {
            "server": core.server_name,
            "version": core.server_version,
            "ready": core.is_ready(),
            "time_ms": time.monotonic_ns() // 1_000_000,
            "models": [
                {
                    "name": entry.name,
                    "version": entry.version,
                    "state": entry.state,
                    "reason": entry.reason,
                    **_counts(series.get((entry.name, entry.version))),
                }
                for entry in core.index()
            ],
            "gauges": {
                family.name: [[dict(labels), value] for _, labels, value in family.samples]
                for family in await core.metrics.collect()
                if family.name in _GAUGES
            },
        }


def _counts(series: ModelSeries | None) -> dict[str, Any]:
    """Since the version was loaded; nothing for one that isn't."""
    if series is None:
        return {}
    statistics = series.statistics
    bins = statistics.request_histogram.bins
    return {
        "success": statistics.success,
        "fail": statistics.fail,
        "inferences": statistics.inference_count,
        "executions": statistics.execution_count,
        "cache_hits": statistics.cache_hits,
        "busy_ms": statistics.busy_ns // 1_000_000,
        "pending": series.num_pending(),
        "instances": series.num_instances(),
        "batches": {str(size): counts.count for size, counts in sorted(statistics.batches.items())},
        "latency_bins": bins[: max((index for index, count in enumerate(bins) if count), default=-1) + 1],
    }


def _policy(page: str) -> str:
    """Only the page's own script and style may run, and it may talk to this server alone."""

    def digest(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; connect-src 'self'; script-src {digest('script')}; style-src {digest('style')}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
