"""Traces as OpenTelemetry spans, sent over OTLP/HTTP; contexts come in and go out as W3C traceparent.

Span names, events and attributes are those of Triton's opentelemetry mode: "InferRequest" for the whole, the
model's name for a request, "compute" for the time on an instance.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from enginehouse.observe.trace_settings import TraceLevel
from enginehouse.observe.trace_span import Span, activities
from enginehouse.types import InferRequest, Tensor

_COMPUTE = ("COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")


@dataclass(frozen=True, slots=True)
class RemoteParent:
    """The context that a request brought with it."""

    context: Context
    is_sampled: bool


class OpenTelemetryExport:
    """Owns the SDK's provider; `close` sends what is left."""

    def __init__(
        self, settings: Mapping[str, str], resource: Mapping[str, str], exporter: SpanExporter | None = None
    ) -> None:
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "enginehouse", **resource}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter or OTLPSpanExporter(endpoint=settings["url"]),
                max_queue_size=int(settings["bsp_max_queue_size"]),
                schedule_delay_millis=float(settings["bsp_schedule_delay"]),
                max_export_batch_size=int(settings["bsp_max_export_batch_size"]),
            )
        )
        self._tracer = self._provider.get_tracer("enginehouse")
        self._propagator = TraceContextTextMapPropagator()
        self._epoch_offset_ns = time.time_ns() - time.monotonic_ns()

    def parent(self, headers: Mapping[str, str]) -> RemoteParent | None:
        """The context in `traceparent` and `tracestate`; None without a valid one."""
        if "traceparent" not in headers:
            return None
        context = self._propagator.extract(headers)
        span_context = trace.get_current_span(context).get_span_context()
        if not span_context.is_valid:
            return None
        return RemoteParent(context, span_context.trace_flags.sampled)

    def recorder(self, level: TraceLevel, ids: Any) -> SpanRecorder:
        return SpanRecorder(self, level, ids)

    def open_root(self, span: Span, parent: RemoteParent | None) -> None:
        span.native = self.start("InferRequest", time.monotonic_ns(), parent.context if parent else Context())

    def start(self, name: str, ns: int, context: Context) -> trace.Span:
        return self._tracer.start_span(name, context, kind=trace.SpanKind.SERVER, start_time=self.epoch_ns(ns))

    def epoch_ns(self, monotonic_ns: int) -> int:
        return monotonic_ns + self._epoch_offset_ns

    def traceparent(self, native: trace.Span) -> str:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, trace.set_span_in_context(native))
        return carrier.get("traceparent", "")

    def close(self) -> None:
        self._provider.shutdown()


class SpanRecorder:
    """One trace. The root Span's native span is the whole; requests' native spans are made as they start."""

    def __init__(self, export: OpenTelemetryExport, level: TraceLevel, ids: Any) -> None:
        # tensors are not for this mode, as in Triton
        self.level = level & TraceLevel.TIMESTAMPS
        self._export = export
        self._ids = ids
        self._request_spans: dict[int, trace.Span] = {}

    def new_id(self) -> int:
        return int(self._ids.next())

    def started(self, span: Span, request: InferRequest, version: int) -> None:
        now_ns = time.monotonic_ns()
        above = self._request_spans.get(span.parent_id, span.root.native)
        native = self._export.start(request.model_name, now_ns, trace.set_span_in_context(above))
        native.set_attribute("triton.model_name", request.model_name)
        native.set_attribute("triton.model_version", version)
        native.set_attribute("triton.trace_id", span.id)
        native.set_attribute("triton.trace_parent_id", span.parent_id)
        if request.id:
            native.set_attribute("triton.request_id", request.id)
        native.add_event("REQUEST_START", timestamp=self._export.epoch_ns(now_ns))
        self._request_spans[span.id] = native

    def stamped(self, span: Span, name: str, ns: int) -> None:
        span.root.native.add_event(name, timestamp=self._export.epoch_ns(ns))

    def tensor(self, span: Span, activity: str, tensor: Tensor) -> None:
        raise AssertionError("bug: this mode has no level TENSORS")

    def ended(self, span: Span, request: InferRequest) -> None:
        native = self._request_spans.get(span.id)
        if native is None:
            return
        moments = dict(activities(request, time.monotonic_ns()))
        if "COMPUTE_START" in moments:
            compute = self._export.start("compute", moments["COMPUTE_START"], trace.set_span_in_context(native))
            for name in _COMPUTE:
                if name in moments:
                    compute.add_event(name, timestamp=self._export.epoch_ns(moments[name]))
            compute.end(self._export.epoch_ns(moments["COMPUTE_END"]))
        if "QUEUE_START" in moments:
            native.add_event("QUEUE_START", timestamp=self._export.epoch_ns(moments["QUEUE_START"]))
        end_ns = self._export.epoch_ns(moments["REQUEST_END"])
        native.add_event("REQUEST_END", timestamp=end_ns)
        native.end(end_ns)

    def finished(self, root: Span) -> None:
        root.native.end()
        self._request_spans.clear()

    def traceparent(self, span: Span) -> str:
        return self._export.traceparent(self._request_spans.get(span.id, span.root.native))
