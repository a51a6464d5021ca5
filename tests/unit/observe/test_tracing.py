"""Trace settings in three layers, sampling by rate and count, traces in files and as OpenTelemetry spans."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from enginehouse.errors import Internal, InvalidArgument, Unsupported
from enginehouse.observe import trace_export
from enginehouse.observe.trace_settings import TraceLevel, TraceMode, defaults_from_options
from enginehouse.observe.tracing import FLUSH_AFTER_TRACES, TraceSettings
from enginehouse.options import OptionError, parse_options
from enginehouse.types import InferRequest, InferResponse, Tensor

OFF = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "/dev/null",
    "trace_mode": "triton",
}


def settings(*trace_config: str, file: str = "/dev/null") -> TraceSettings:
    argv = [f"--trace-config=triton,file={file}", *(f"--trace-config={each}" for each in trace_config)]
    return TraceSettings.of(parse_options(argv, {}))


def trace(tracing: TraceSettings, model: str = "m", headers: Mapping[str, str] | None = None) -> bool:
    """One request as a front end and core would run it; whether it was traced."""
    span = tracing.sample(model, headers)
    if span is None:
        return False
    request = InferRequest(model, id="r1", inputs={"X": Tensor.from_numpy("X", np.array([1.5, 2], "f4"))})
    request.sink, request.trace = (lambda response: None), span
    span.stamp("HTTP_RECV_START", 1)
    span.follow(request, 7)
    request.times.queued_ns, request.times.started_ns = 10, 20
    request.times.compute_input_end_ns, request.times.compute_output_start_ns = 30, 40
    request.sink(InferResponse(outputs=[Tensor.from_numpy("Y", np.array([3], "i4"))]))
    span.finish()
    return True


class TestSettings:
    def test_what_the_flags_say_is_the_start(self) -> None:
        assert settings().as_dict() == OFF
        assert settings().as_dict("m") == OFF
        assert not settings().enabled

    def test_one_for_all_and_back(self) -> None:
        tracing = settings()
        tracing.apply_json("", {"trace_level": ["TIMESTAMPS"], "trace_rate": "5"})
        expected = {**OFF, "trace_level": ["TIMESTAMPS"], "trace_rate": "5"}
        assert tracing.as_dict() == expected
        assert tracing.as_dict("m") == expected
        assert tracing.enabled
        tracing.apply_json("", dict.fromkeys(("trace_level", "trace_rate", "trace_count", "log_frequency")))
        assert tracing.as_dict() == OFF
        assert not tracing.enabled

    def test_a_models_own_settings_follow_the_rest_field_by_field(self) -> None:
        tracing = settings()
        tracing.apply_json("m", {"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_count": "3"})
        assert tracing.as_dict() == OFF
        assert tracing.as_dict("m") == {**OFF, "trace_level": ["TIMESTAMPS", "TENSORS"], "trace_count": "3"}
        tracing.apply_json("", {"trace_rate": "9", "trace_count": "100"})
        assert tracing.as_dict("m")["trace_rate"] == "9"
        assert tracing.as_dict("m")["trace_count"] == "3"
        tracing.apply_grpc("m", {"trace_level": [], "trace_count": []})
        assert tracing.as_dict("m") == {**OFF, "trace_rate": "9", "trace_count": "100"}

    def test_levels_that_there_are_not_are_ignored(self) -> None:
        tracing = settings()
        tracing.apply_json("", {"trace_level": ["LOUD"], "colour": 1})
        assert tracing.as_dict() == OFF

    @pytest.mark.parametrize(
        ("document", "error", "text"),
        [
            ({"trace_file": "x"}, Unsupported, "trace file location can not be updated through network protocol"),
            ({"trace_rate": 5}, Internal, "attempt to access JSON non-string as string"),
            ({"trace_rate": "fast"}, InvalidArgument, "Unable to parse 'trace_rate', got: fast"),
            ({"trace_rate": "9999999999"}, InvalidArgument, "'trace_rate', value is out of range [ 0, 4294967295 ]"),
            ({"trace_count": "-7"}, InvalidArgument, "'trace_count'. Expecting value >= -1, got:-7"),
            ({"trace_level": ["OFF", "TENSORS"]}, InvalidArgument, "Expect only one trace level 'OFF' is specified"),
            ({"trace_level": "OFF"}, Internal, "attempt to access JSON non-array as array"),
            ({"trace_level": [3]}, Internal, "attempt to access JSON non-string as string"),
            ({"log_frequency": "x"}, InvalidArgument, "Unable to parse 'log_frequency', got: x"),
            (
                {"trace_level": ["TENSORS"], "trace_rate": "0"},
                InvalidArgument,
                "Attempting to set invalid trace setting :sample rate must be non-zero",
            ),
        ],
    )
    def test_bad_http_updates_change_nothing(self, document: dict[str, Any], error: type[Exception], text: str) -> None:
        tracing = settings()
        with pytest.raises(error, match=re.escape(text)):
            tracing.apply_json("", {"log_frequency": "50", **document})
        assert tracing.as_dict() == OFF

    @pytest.mark.parametrize(
        ("given", "error", "text"),
        [
            ({"trace_rate": ["7", "8"]}, InvalidArgument, "expect only 1 value for 'trace_rate'"),
            ({"trace_count": ["-7"]}, InvalidArgument, "'trace_count'. Expecting value >= -1, got: -7"),
            ({"trace_file": ["a"]}, Unsupported, "trace file location can not be updated"),
        ],
    )
    def test_bad_grpc_updates(self, given: dict[str, list[str]], error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=re.escape(text)):
            settings().apply_grpc("", given)

    def test_tracing_to_files_needs_a_file(self) -> None:
        tracing = TraceSettings.of(parse_options([], {}))
        with pytest.raises(InvalidArgument, match="trace file name is not given"):
            tracing.apply_json("", {"trace_level": ["TIMESTAMPS"]})

    def test_numbers_are_read_as_c_reads_them(self) -> None:
        tracing = settings()
        tracing.apply_json("", {"trace_rate": " 12abc", "log_frequency": "-1"})
        assert tracing.as_dict()["trace_rate"] == "12"
        assert tracing.as_dict()["log_frequency"] == "4294967295"


class TestFlags:
    def test_the_deprecated_ones_and_the_new_one(self) -> None:
        argv = [
            "--trace-file=a",
            "--trace-level=timestamps",
            "--trace-rate=3",
            "--trace-count=4",
            "--trace-log-frequency=5",
        ]
        values = defaults_from_options(parse_options(argv, {})).values
        assert (values.file, values.level, values.rate, values.count, values.log_frequency) == (
            "a", TraceLevel.TIMESTAMPS, 3, 4, 5,
        )  # fmt: skip
        argv += ["--trace-config=rate=30", "--trace-config=triton,file=b", "--trace-config=level=TENSORS"]
        values = defaults_from_options(parse_options(argv, {})).values
        assert (values.file, values.rate) == ("b", 30)
        assert values.level == TraceLevel.TIMESTAMPS | TraceLevel.TENSORS

    def test_off_beats_every_other_level(self) -> None:
        options = parse_options(["--trace-config=level=TENSORS", "--trace-config=level=OFF"], {})
        assert defaults_from_options(options).values.level is TraceLevel.OFF

    def test_opentelemetry_settings_have_defaults_and_are_shown(self) -> None:
        argv = ["--trace-config=mode=opentelemetry", "--trace-config=opentelemetry,resource=service.name=svc"]
        defaults = defaults_from_options(parse_options(argv, {}))
        assert defaults.mode is TraceMode.OPENTELEMETRY
        assert defaults.resource == {"service.name": "svc"}
        tracing = TraceSettings(defaults)
        try:
            assert list(tracing.as_dict()) == [
                "trace_level", "trace_rate", "trace_count", "trace_mode", "url", "bsp_max_queue_size",
                "bsp_schedule_delay", "bsp_max_export_batch_size", "resource",
            ]  # fmt: skip
        finally:
            tracing.close()

    @pytest.mark.parametrize("flag", ["level=LOUD", "mode=zipkin", "rate=x", "triton,colour=red"])
    def test_bad_flags_are_refused(self, flag: str) -> None:
        with pytest.raises(OptionError):
            defaults_from_options(parse_options([f"--trace-config={flag}"], {}))


class TestSampling:
    def test_one_in_so_many(self) -> None:
        tracing = settings("level=TIMESTAMPS", "rate=3")
        assert [trace(tracing) for _ in range(7)] == [False, False, True, False, False, True, False]

    def test_the_count_is_used_up_and_shown(self, tmp_path: Path) -> None:
        tracing = settings("level=TIMESTAMPS", "rate=1", "count=2", file=str(tmp_path / "t"))
        assert [trace(tracing) for _ in range(4)] == [True, True, False, False]
        assert tracing.as_dict()["trace_count"] == "0"
        assert len(json.loads((tmp_path / "t.0").read_text())) > 2

    def test_a_model_can_be_traced_alone(self) -> None:
        tracing = settings("rate=1")
        tracing.apply_json("m", {"trace_level": ["TIMESTAMPS"]})
        assert tracing.enabled
        assert trace(tracing, "m")
        assert not trace(tracing, "other")


class TestFiles:
    def test_a_trace_reads_as_tritons(self, tmp_path: Path) -> None:
        tracing = settings("level=TIMESTAMPS", "level=TENSORS", "rate=1", file=str(tmp_path / "t.json"))
        trace(tracing)
        tracing.close()
        entries = json.loads((tmp_path / "t.json").read_text())
        assert {"id": 1, "model_name": "m", "model_version": 7, "request_id": "r1"} in entries
        stamps = [entry["timestamps"][0] for entry in entries if "timestamps" in entry]
        assert [stamp["name"] for stamp in stamps] == [
            "HTTP_RECV_START", "REQUEST_START", "INFER_RESPONSE_COMPLETE", "QUEUE_START", "COMPUTE_START",
            "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END", "REQUEST_END",
        ]  # fmt: skip
        tensors = [entry for entry in entries if "tensor" in entry]
        assert tensors[0] == {
            "id": 1,
            "activity": "TENSOR_QUEUE_INPUT",
            "tensor": {"name": "X", "data": "1.5,2", "shape": "2", "dtype": "FP32"},
        }
        assert tensors[1]["tensor"]["data"] == "3"

    def test_children_name_their_parent(self, tmp_path: Path) -> None:
        tracing = settings("level=TIMESTAMPS", "rate=1", file=str(tmp_path / "t.json"))
        root = tracing.sample("ensemble")
        assert root is not None
        outer, step = InferRequest("ensemble"), InferRequest("step")
        outer.sink = step.sink = lambda response: None
        root.follow(outer, 1)
        root.child().follow(step, 2)
        step.sink(InferResponse())
        outer.sink(InferResponse())
        root.finish()
        tracing.close()
        models = [entry for entry in json.loads((tmp_path / "t.json").read_text()) if "model_name" in entry]
        assert [(each["model_name"], each.get("parent_id")) for each in models] == [("ensemble", None), ("step", 1)]

    def test_a_log_frequency_makes_numbered_files(self, tmp_path: Path) -> None:
        tracing = settings("level=TIMESTAMPS", "rate=1", "triton,log-frequency=2", file=str(tmp_path / "t"))
        for _ in range(5):
            trace(tracing)
        tracing.close()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["t.0", "t.1", "t.2"]
        sizes = [len({e["id"] for e in json.loads(path.read_text())}) for path in sorted(tmp_path.iterdir())]
        assert sizes == [2, 2, 1]

    def test_many_traces_do_not_wait_in_memory_and_make_one_array(self, tmp_path: Path) -> None:
        tracing = settings("level=TIMESTAMPS", "rate=1", file=str(tmp_path / "t"))
        for _ in range(FLUSH_AFTER_TRACES + 1):
            trace(tracing)
        assert (tmp_path / "t").stat().st_size > 0
        tracing.close()
        entries = json.loads((tmp_path / "t").read_text())
        assert len({entry["id"] for entry in entries}) == FLUSH_AFTER_TRACES + 1

    def test_new_settings_write_what_the_old_ones_kept(self, tmp_path: Path) -> None:
        tracing = settings("level=TIMESTAMPS", "rate=1", file=str(tmp_path / "t"))
        trace(tracing)
        tracing.apply_json("", {"trace_level": ["OFF"]})
        assert (tmp_path / "t").exists()

    def test_a_file_that_can_not_be_written_is_logged_and_fails_nothing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tracing = settings("level=TIMESTAMPS", "rate=1", "count=1", file=str(tmp_path / "no" / "t"))
        assert trace(tracing)
        assert "failed creating trace file" in caplog.text


class TestOpenTelemetry:
    @pytest.fixture
    def exporter(self, monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
        exporter = InMemorySpanExporter()
        monkeypatch.setattr(trace_export, "OTLPSpanExporter", lambda endpoint: exporter)
        return exporter

    @pytest.fixture
    def tracing(self, exporter: InMemorySpanExporter) -> Iterator[TraceSettings]:
        argv = ["--trace-config=mode=opentelemetry", "--trace-config=level=TIMESTAMPS", "--trace-config=rate=2"]
        tracing = TraceSettings.of(parse_options(argv, {}))
        yield tracing
        tracing.close()

    def test_spans_have_tritons_names_events_and_attributes(
        self, tracing: TraceSettings, exporter: InMemorySpanExporter
    ) -> None:
        assert not trace(tracing)
        assert trace(tracing)
        tracing.close()
        spans = {span.name: span for span in exporter.get_finished_spans()}
        assert set(spans) == {"InferRequest", "m", "compute"}
        root, model, compute = spans["InferRequest"], spans["m"], spans["compute"]
        assert root.parent is None
        assert model.parent is not None
        assert compute.parent is not None
        assert root.context is not None
        assert model.context is not None
        assert model.parent.span_id == root.context.span_id
        assert compute.parent.span_id == model.context.span_id
        assert model.attributes == {
            "triton.model_name": "m",
            "triton.model_version": 7,
            "triton.trace_id": 1,
            "triton.trace_parent_id": 0,
            "triton.request_id": "r1",
        }
        assert [event.name for event in model.events] == ["REQUEST_START", "QUEUE_START", "REQUEST_END"]
        assert [event.name for event in compute.events][:2] == ["COMPUTE_START", "COMPUTE_INPUT_END"]
        assert [event.name for event in root.events] == ["HTTP_RECV_START", "INFER_RESPONSE_COMPLETE"]
        assert compute.start_time is not None
        assert compute.end_time is not None
        assert compute.end_time > compute.start_time

    def test_a_sampled_context_from_outside_is_continued_whatever_the_rate(
        self, tracing: TraceSettings, exporter: InMemorySpanExporter
    ) -> None:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        assert trace(tracing, headers={"traceparent": parent})
        tracing.close()
        (root,) = [span for span in exporter.get_finished_spans() if span.name == "InferRequest"]
        assert root.context is not None
        assert root.parent is not None
        assert f"{root.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
        assert f"{root.parent.span_id:016x}" == "b7ad6b7169203331"

    def test_a_broken_context_starts_a_trace_of_its_own(self, tracing: TraceSettings) -> None:
        assert not trace(tracing, headers={"traceparent": "zz"})
        assert trace(tracing, headers={"traceparent": "00-0-0-00"})

    def test_a_request_can_hand_its_context_on(self, tracing: TraceSettings) -> None:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        span = tracing.sample("m", {"traceparent": parent})
        assert span is not None
        request = InferRequest("m", sink=lambda response: None)
        span.follow(request, 1)
        assert span.traceparent.startswith("00-0af7651916cd43dd8448eb211c80319c-")
        assert span.traceparent != parent
        assert request.sink is not None
        request.sink(InferResponse())
        span.finish()
