"""Which requests are traced, and where their traces go. Off, it costs a look at `enabled`.

Front ends: `if core.tracing.enabled: request.trace = core.tracing.sample(model, headers)`, then stamps, then
`finish` when the answer is sent. Core: `if request.trace is not None: request.trace.follow(request, version)`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from enginehouse.observe.trace_file import Entry, TraceFile
from enginehouse.observe.trace_settings import (
    TraceDefaults,
    TraceLayers,
    TraceLevel,
    TraceMode,
    TraceValues,
    change_from_grpc,
    change_from_json,
    defaults_from_options,
)
from enginehouse.observe.trace_span import Span, activities, tensor_text
from enginehouse.options import ServerOptions
from enginehouse.types import InferRequest, Tensor

FLUSH_AFTER_TRACES = 100
"""How many traces may wait in memory where the settings name no number for a file."""


class Sampler:
    """One setting at work: counts requests, keeps finished traces, writes them."""

    def __init__(self, values: TraceValues, file: TraceFile | None) -> None:
        self.values = values
        self.count_left = values.count
        self._file = file
        self._num_seen = 0
        self._num_open = 0
        self._traces: list[list[Entry]] = []

    @property
    def is_on(self) -> bool:
        return self.values.level is not TraceLevel.OFF

    def wants(self) -> bool:
        """Whether this request is one of those to trace."""
        if not self.is_on or self.count_left == 0:
            return False
        self._num_seen += 1
        if self._num_seen % self.values.rate:
            return False
        if self.count_left > 0:
            self.count_left -= 1
        self._num_open += 1
        return True

    def collect(self, entries: list[Entry]) -> None:
        """A trace is complete."""
        self._num_open -= 1
        self._traces.append(entries)
        frequency = self.values.log_frequency
        used_up = self.count_left == 0 and self._num_open == 0
        if used_up or (frequency and len(self._traces) >= frequency):
            self._write(indexed=True)
        elif self.values.count < 0 and not frequency and len(self._traces) >= FLUSH_AFTER_TRACES:
            self._write(indexed=False)

    def flush(self) -> None:
        """The setting is replaced or the server ends."""
        self._write(indexed=self.values.log_frequency != 0)

    def _write(self, *, indexed: bool) -> None:
        traces, self._traces = self._traces, []
        if not traces or self._file is None:
            return
        entries = [entry for trace in traces for entry in trace]
        if indexed:
            self._file.write_indexed(entries)
        else:
            self._file.append(entries)


class FileRecorder:
    """Mode triton: one trace as JSON entries."""

    def __init__(self, sampler: Sampler, ids: TraceIds) -> None:
        self.level = sampler.values.level
        self._sampler = sampler
        self._ids = ids
        self._entries: dict[int, list[Entry]] = {}
        self._is_finished = False

    def new_id(self) -> int:
        return self._ids.next()

    def started(self, span: Span, request: InferRequest, version: int) -> None:
        model: Entry = {"id": span.id, "model_name": request.model_name, "model_version": version}
        if request.id:
            model["request_id"] = request.id
        if span.parent_id:
            model["parent_id"] = span.parent_id
        self._of(span).append(model)
        self.stamped(span, "REQUEST_START", time.monotonic_ns())

    def stamped(self, span: Span, name: str, ns: int) -> None:
        if self.level & TraceLevel.TIMESTAMPS:
            self._of(span).append({"id": span.id, "timestamps": [{"name": name, "ns": ns}]})

    def tensor(self, span: Span, activity: str, tensor: Tensor) -> None:
        self._of(span).append({"id": span.id, "activity": activity, "tensor": tensor_text(tensor)})

    def ended(self, span: Span, request: InferRequest) -> None:
        for name, ns in activities(request, time.monotonic_ns()):
            self.stamped(span, name, ns)

    def finished(self, root: Span) -> None:
        self._sampler.collect([entry for entries in self._entries.values() for entry in entries])
        self._entries = {}

    def traceparent(self, span: Span) -> str:
        return ""

    def _of(self, span: Span) -> list[Entry]:
        return self._entries.setdefault(span.id, [])


class TraceIds:
    """Numbers that tell the requests of all traces apart."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        self._last += 1
        return self._last


class TraceSettings:
    """Trace settings of the server and its models, and the sampling by them. On the server's loop."""

    def __init__(self, defaults: TraceDefaults) -> None:
        self.enabled = False
        """Whether any request may be traced: look here before calling `sample`."""
        self._layers = TraceLayers(defaults)
        self._ids = TraceIds()
        self._files: dict[str, TraceFile] = {}
        self._exporter: Any = None
        if defaults.mode is TraceMode.OPENTELEMETRY:
            # here, not above: the SDK takes a tenth of a second to import
            from enginehouse.observe.trace_export import OpenTelemetryExport

            self._exporter = OpenTelemetryExport(defaults.exporter, defaults.resource)
        self._for_all = self._sampler(self._layers.values())
        self._for_model: dict[str, Sampler] = {}
        self._look()

    @classmethod
    def of(cls, options: ServerOptions) -> TraceSettings:
        """As the flags say. Raises OptionError."""
        return cls(defaults_from_options(options))

    # --- settings

    def as_dict(self, model: str = "") -> dict[str, str | list[str]]:
        """In the protocol's names and order; `trace_count` is what is left of it."""
        sampler = self._for_model.get(model, self._for_all)
        values = sampler.values
        settings: dict[str, str | list[str]] = {
            "trace_level": values.level.names,
            "trace_rate": str(values.rate),
            "trace_count": str(sampler.count_left),
        }
        defaults = self._layers.defaults
        if defaults.mode is TraceMode.TRITON:
            settings |= {"log_frequency": str(values.log_frequency), "trace_file": values.file}
        settings["trace_mode"] = defaults.mode.value
        settings |= defaults.exporter
        if defaults.resource:
            settings["resource"] = ",".join(f"{key}={value}" for key, value in defaults.resource.items())
        return settings

    def apply_json(self, model: str, document: Mapping[str, Any]) -> None:
        """An HTTP update, for all models if `model` is empty. All of it is applied or nothing."""
        self._update(model, change_from_json(document))

    def apply_grpc(self, model: str, settings: Mapping[str, Sequence[str]]) -> None:
        self._update(model, change_from_grpc(settings))

    def _update(self, model: str, change: Mapping[str, Any]) -> None:
        self._layers.update(model, change)
        stale = [model] if model else ["", *self._for_model]
        for name in stale:
            before = self._for_model.pop(name, None) if name else self._for_all
            if before is not None:
                before.flush()
            if not name:
                self._for_all = self._sampler(self._layers.values())
            elif name in self._layers.models:
                self._for_model[name] = self._sampler(self._layers.values(name))
        self._look()

    def _look(self) -> None:
        self.enabled = self._for_all.is_on or any(each.is_on for each in self._for_model.values())

    def _sampler(self, values: TraceValues) -> Sampler:
        if self._layers.defaults.mode is TraceMode.OPENTELEMETRY or not values.file:
            return Sampler(values, None)
        return Sampler(values, self._files.setdefault(values.file, TraceFile(values.file)))

    # --- sampling

    def sample(self, model: str, headers: Mapping[str, str] | None = None) -> Span | None:
        """A root span if this request is to be traced. `headers` (names in lower case) may carry a
        traceparent, whose trace is then continued, whatever the rate if it is a sampled one."""
        sampler = self._for_model.get(model, self._for_all)
        if not sampler.is_on:
            return None
        if self._exporter is None:
            return Span(FileRecorder(sampler, self._ids)) if sampler.wants() else None
        parent = self._exporter.parent(headers or {})
        if not (sampler.wants() or (parent is not None and parent.is_sampled)):
            return None
        span = Span(self._exporter.recorder(sampler.values.level, self._ids))
        self._exporter.open_root(span, parent)
        return span

    def close(self) -> None:
        """Writes what is still in memory."""
        for sampler in (self._for_all, *self._for_model.values()):
            sampler.flush()
        for file in self._files.values():
            file.close()
        if self._exporter is not None:
            self._exporter.close()
