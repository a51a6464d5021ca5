"""Logs, metrics, statistics and traces of a real server, read as operators' tools read them."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from enginehouse.testing.server import ServerProcess

EXAMPLES = Path(__file__).resolve().parents[2] / "model_repository"
LINE = re.compile(r"[IWE]\d{4} \d\d:\d\d:\d\d\.\d{6} \d+ [\w.]+:\d+\] ")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of `model.py`, which need nothing built, and an ensemble of one."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("identity", "add_sub"):
        (folder / name).symlink_to(EXAMPLES / name)
    twice = folder / "twice" / "1"
    twice.mkdir(parents=True)
    (folder / "twice" / "config.pbtxt").write_text(
        'platform: "ensemble" max_batch_size: 64\n'
        'input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]\n'
        'output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]\n'
        "ensemble_scheduling { step [\n"
        '  { model_name: "identity" model_version: -1 input_map { key: "INPUT0" value: "INPUT0" }\n'
        '    output_map { key: "OUTPUT0" value: "between" } },\n'
        '  { model_name: "identity" model_version: -1 input_map { key: "INPUT0" value: "between" }\n'
        '    output_map { key: "OUTPUT0" value: "OUTPUT0" } }\n'
        "] }\n"
    )
    counting = folder / "counting" / "1"
    counting.mkdir(parents=True)
    (folder / "counting" / "config.pbtxt").write_text(
        'backend: "python" max_batch_size: 8 instance_group [ { count: 2 } ]\n'
        'input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]\n'
        'output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]\n'
    )
    (counting / "model.py").write_text(COUNTING)
    return folder


COUNTING = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        pages = pb_utils.MetricFamily("pages_read", "Pages read.", pb_utils.MetricFamily.COUNTER)
        sizes = pb_utils.MetricFamily("page_size", "Sizes of pages.", pb_utils.MetricFamily.HISTOGRAM)
        self.pages = pages.Metric(labels={"reader": "a"})
        self.sizes = sizes.Metric(buckets=[1, 2, 4])

    def execute(self, requests):
        responses = []
        for request in requests:
            values = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            self.pages.increment(1)
            self.sizes.observe(values.size)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", values)]))
        return responses
"""


def infer_http(server: ServerProcess, model: str = "identity", **more: object) -> None:
    values = np.arange(4, dtype=np.float32).reshape(1, 4)
    tensor = httpclient.InferInput("INPUT0", [1, 4], "FP32").set_data_from_numpy(values)
    with httpclient.InferenceServerClient(server.http) as client:
        answer = client.infer(model, [tensor], request_id="r1", **more)
    assert (answer.as_numpy("OUTPUT0") == values).all()


def infer_grpc(server: ServerProcess, model: str = "identity", **more: object) -> None:
    values = np.arange(4, dtype=np.float32).reshape(1, 4)
    tensor = grpcclient.InferInput("INPUT0", [1, 4], "FP32").set_data_from_numpy(values)
    with grpcclient.InferenceServerClient(server.grpc) as client:
        answer = client.infer(model, [tensor], request_id="r1", **more)
    assert (answer.as_numpy("OUTPUT0") == values).all()


class TestOneServer:
    @pytest.fixture(scope="class")
    def server(self, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
        flags = ["--metrics-config=summary_latencies=true", "--cache-config=local,size=1048576"]
        flags += ["--model-control-mode=explicit", "--load-model=*"]
        with ServerProcess([repository], flags) as server:
            yield server

    def test_every_line_of_the_log_is_of_tritons_form_or_a_table(self, server: ServerProcess) -> None:
        lines = server.log.splitlines()
        assert any("add_sub" in line and "READY" in line for line in lines)
        assert [line for line in lines if line and not LINE.match(line) and line[0] not in "+|"] == []

    def test_metrics_are_readable_and_count_what_was_asked(self, server: ServerProcess) -> None:
        def successes() -> dict[str, float]:
            with urllib.request.urlopen(server.metrics_url) as answer:
                families = list(text_string_to_metric_families(answer.read().decode()))
            return {
                sample.labels["model"]: sample.value
                for family in families
                for sample in family.samples
                if family.name == "nv_inference_request_success"
            }

        before = successes()
        infer_http(server)
        infer_grpc(server, "twice")
        after = successes()
        assert {name: after[name] - before[name] for name in after} == {
            "identity": 3,
            "twice": 1,
            "add_sub": 0,
            "counting": 0,
        }

    def test_metrics_of_a_model_with_two_instances_come_and_go_with_it(self, server: ServerProcess) -> None:
        def exposition() -> str:
            with urllib.request.urlopen(server.metrics_url) as answer:
                return str(answer.read().decode())

        infer_http(server, "counting")
        infer_http(server, "counting")
        text = exposition()
        assert "# HELP pages_read Pages read.\n# TYPE pages_read counter\n" in text
        assert 'pages_read{reader="a"} 2\n' in text
        assert 'page_size_bucket{le="4"} 2\n' in text
        assert 'page_size_bucket{le="2"} 0\n' in text
        with httpclient.InferenceServerClient(server.http) as client:
            client.unload_model("counting")
            deadline = time.monotonic() + 20
            while "pages_read" in exposition():
                assert time.monotonic() < deadline, "the metrics outlived their model"
                time.sleep(0.05)

    def test_statistics_of_both_protocols_agree(self, server: ServerProcess) -> None:
        infer_http(server)
        with (
            httpclient.InferenceServerClient(server.http) as http,
            grpcclient.InferenceServerClient(server.grpc) as grpc,
        ):
            (one,) = http.get_inference_statistics("identity")["model_stats"]
            (other,) = grpc.get_inference_statistics("identity", as_json=True)["model_stats"]
        assert one["inference_count"] == int(other["inference_count"])
        assert one["inference_stats"]["success"]["ns"] == int(other["inference_stats"]["success"]["ns"])
        assert one["last_inference"] > 0

    def test_log_settings_work_while_the_server_runs(self, server: ServerProcess) -> None:
        with httpclient.InferenceServerClient(server.http) as client:
            client.update_log_settings({"log_verbose_level": 1, "log_format": "ISO8601"})
            assert client.get_log_settings()["log_format"] == "ISO8601"
            client.update_log_settings({"log_verbose_level": 0, "log_format": "default"})


@pytest.mark.parametrize(
    ("infer", "stamps"),
    [
        (infer_http, {"HTTP_RECV_START", "HTTP_RECV_END", "HTTP_SEND_START", "HTTP_SEND_END"}),
        (infer_grpc, {"GRPC_WAITREAD_START", "GRPC_WAITREAD_END", "GRPC_SEND_START", "GRPC_SEND_END"}),
    ],
    ids=["http", "grpc"],
)
def test_traces_of_an_ensemble_are_written_with_their_steps(
    infer: Callable[..., None], stamps: set[str], repository: Path, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    flags = [f"--trace-config=triton,file={path}", "--trace-config=level=TIMESTAMPS", "--trace-config=rate=1"]
    with ServerProcess([repository], flags) as server:
        infer(server, "twice")
    entries = json.loads(path.read_text())
    models = [entry for entry in entries if "model_name" in entry]
    assert [(each["model_name"], "parent_id" in each) for each in models] == [
        ("twice", False),
        ("identity", True),
        ("identity", True),
    ]
    assert models[0]["request_id"] == "r1"
    root = {stamp["name"] for e in entries if e["id"] == models[0]["id"] for stamp in e.get("timestamps", ())}
    step = {stamp["name"] for e in entries if e["id"] == models[1]["id"] for stamp in e.get("timestamps", ())}
    assert stamps <= root
    assert {"REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_END", "REQUEST_END"} <= step


class Collector(HTTPServer):
    """Takes OTLP over HTTP, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Export)
        self.requests: list[ExportTraceServiceRequest] = []


class _Export(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Not to stderr."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    yield collector
    collector.shutdown()
    thread.join()
    collector.server_close()


def test_spans_reach_a_collector_in_the_callers_trace(repository: Path, collector: Collector) -> None:
    flags = [
        "--trace-config=mode=opentelemetry",
        "--trace-config=level=TIMESTAMPS",
        f"--trace-config=opentelemetry,url=http://127.0.0.1:{collector.server_port}/v1/traces",
        "--trace-config=opentelemetry,resource=service.name=shop",
    ]
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with ServerProcess([repository], flags) as server:
        infer_http(server, "twice", headers={"traceparent": parent})
    resources = [each for request in collector.requests for each in request.resource_spans]
    spans = [span for each in resources for scope in each.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {"0af7651916cd43dd8448eb211c80319c"}
    assert sorted(span.name for span in spans) == sorted(
        ["InferRequest", "twice", "identity", "identity", "compute", "compute", "compute"]
    )
    by_id = {span.span_id: span for span in spans}
    steps = [span for span in spans if span.name == "identity"]
    assert {by_id[step.parent_span_id].name for step in steps} == {"twice"}
    attributes = {each.key: each.value.string_value for each in resources[0].resource.attributes}
    assert attributes["service.name"] == "shop"


def test_json_lines_can_be_had(repository: Path) -> None:
    with ServerProcess([repository], ["--log-format=json"]) as server:
        lines = server.log.splitlines()
    assert all({"time", "level", "file", "line", "message"} <= set(json.loads(line)) for line in lines)


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--htp-port=1", "did you mean '--http-port'?"),
        ("--cache-config=size=3", "No cache specified"),
        ("--trace-config=level=LOUD", "invalid value for trace level option: LOUD"),
        ("--metrics-config=colour=red", "unknown --metrics-config setting 'colour'"),
    ],
)
def test_bad_flags_end_the_command_with_a_reason(repository: Path, flag: str, text: str) -> None:
    command = [sys.executable, "-m", "enginehouse", "serve", f"--model-repository={repository}", flag]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr
