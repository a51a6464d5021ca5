"""The exposition: Triton's families to the letter, series that come and go with models, custom metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import (
    AlreadyExists,
    EnginehouseError,
    FailureReason,
    InvalidArgument,
    NotFound,
    Unsupported,
)
from enginehouse.execution.contract import ExecutionTimes
from enginehouse.observe.custom_metrics import CustomMetrics
from enginehouse.observe.exposition import number
from enginehouse.observe.hosting_families import VersionReading, memory_families, version_families
from enginehouse.observe.metrics import CacheReading, Metrics
from enginehouse.observe.metrics_settings import MetricsSettings
from enginehouse.observe.statistics import ModelStatistics
from enginehouse.observe.system_families import GPU_FAMILIES, GpuReader
from enginehouse.options import OptionError, parse_options
from enginehouse.types import InferRequest, InferResponse, MetricFamily

RECORDED = json.loads((Path(__file__).parent / "nv_families.json").read_text())


def settings(*metrics_config: str) -> MetricsSettings:
    argv = [f"--metrics-config={each}" for each in metrics_config]
    return MetricsSettings.from_options(parse_options([*argv, "--allow-gpu-metrics=false"], {}))


def config(name: str = "m", **more: object) -> ModelConfig:
    return ModelConfig(name=name, **more)  # type: ignore[arg-type]  # fields by name


def samples(exposition: bytes) -> dict[str, float]:
    """By the line's left side, as it is written."""
    lines = (line for line in exposition.decode().splitlines() if line and not line.startswith("#"))
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def run(statistics: ModelStatistics, rows: int = 1) -> None:
    request = InferRequest("m", batch_size=rows)
    now = request.times.received_ns = request.times.queued_ns = time.monotonic_ns()
    statistics.on_batch([request], None, ExecutionTimes(now, now + 1000, now + 3000, now + 4000), None)


def test_the_families_are_those_that_were_recorded_from_triton() -> None:
    metrics = Metrics(settings())
    metrics.read_cache = CacheReading
    metrics.open_model(config(), 1, has_cache=True)
    families = {
        line.split(" ", 3)[2]: line.split(" ", 3)[3]
        for line in metrics.render().decode().splitlines()
        if line.startswith("# HELP nv_")
    }
    types = {
        line.split(" ")[2]: line.split(" ")[3]
        for line in metrics.render().decode().splitlines()
        if line.startswith("# TYPE nv_")
    }
    assert families == {name: each["help"] for name, each in RECORDED.items()}
    assert types == {name: each["type"] for name, each in RECORDED.items()}


def test_the_exposition_is_what_prometheus_reads() -> None:
    metrics = Metrics(settings("summary_latencies=true", "histogram_latencies=true"))
    decoupled = config("d", model_transaction_policy={"decoupled": True})
    for statistics in (metrics.open_model(config(), 1), metrics.open_model(decoupled, 1)):
        run(statistics)
    parsed = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert parsed["enginehouse_request_duration_seconds"].type == "histogram"
    assert parsed["nv_inference_queue_summary_us"].type == "summary"
    assert parsed["nv_inference_first_response_histogram_ms"].type == "histogram"


def test_lines_are_spelt_as_triton_spells_them() -> None:
    metrics = Metrics(settings())
    run(metrics.open_model(config("simple", metric_tags={"team": "blue"}), 1), rows=4)
    found = samples(metrics.render())
    assert found['nv_inference_request_success{_team="blue",model="simple",version="1"}'] == 1
    assert found['nv_inference_count{_team="blue",model="simple",version="1"}'] == 4
    assert found['nv_inference_request_failure{_team="blue",model="simple",reason="OTHER",version="1"}'] == 0


def test_queues_are_read_when_somebody_looks() -> None:
    metrics = Metrics(settings())
    queue: list[int] = []
    metrics.watch(metrics.open_model(config(), 1), lambda: len(queue))
    queue += [1, 2, 3]
    assert samples(metrics.render())['nv_inference_pending_request_count{model="m",version="1"}'] == 3


def test_a_reload_begins_again_but_keeps_the_failures() -> None:
    metrics = Metrics(settings())
    before = metrics.open_model(config(), 1)
    run(before)
    request = InferRequest("m")
    before.on_failure(request, EnginehouseError("full", reason=FailureReason.REJECTED))
    metrics.close_model(before)
    assert 'nv_inference_request_success{model="m",version="1"}' not in samples(metrics.render())
    metrics.open_model(config(), 1)
    found = samples(metrics.render())
    assert found['nv_inference_request_success{model="m",version="1"}'] == 0
    assert found['nv_inference_request_failure{model="m",reason="REJECTED",version="1"}'] == 1


def test_two_builds_of_a_version_have_one_series_until_the_old_one_has_gone() -> None:
    metrics = Metrics(settings())
    old = metrics.open_model(config(), 1)
    run(old)
    run(metrics.open_model(config(), 1), rows=3)
    lines = [line.rpartition(" ")[0] for line in metrics.render().decode().splitlines() if line[:1] != "#"]
    assert len(lines) == len(set(lines))
    assert samples(metrics.render())['nv_inference_count{model="m",version="1"}'] == 1
    metrics.close_model(old)
    assert samples(metrics.render())['nv_inference_count{model="m",version="1"}'] == 3


def test_cache_series_are_only_of_models_with_a_cache() -> None:
    metrics = Metrics(settings())
    metrics.open_model(config("cached"), 1, has_cache=True)
    metrics.open_model(config("plain"), 1)
    found = samples(metrics.render())
    assert 'nv_cache_num_hits_per_model{model="cached",version="1"}' in found
    assert 'nv_cache_num_hits_per_model{model="plain",version="1"}' not in found
    assert "nv_cache_util" not in found


def test_latency_counters_can_be_switched_off() -> None:
    metrics = Metrics(settings("counter_latencies=false"))
    metrics.open_model(config(), 1)
    names = {line.split("{")[0] for line in samples(metrics.render())}
    assert "nv_inference_request_duration_us" not in names
    assert "nv_inference_request_success" in names


def test_summaries_have_the_quantiles_that_were_asked_for() -> None:
    metrics = Metrics(settings("summary_latencies=true", "summary_quantiles=0.25:0.05,0.75:0.01"))
    run(metrics.open_model(config(), 1))
    found = samples(metrics.render())
    assert found['nv_inference_compute_infer_summary_us{model="m",version="1",quantile="0.25"}'] == pytest.approx(
        2, rel=0.02
    )
    assert found['nv_inference_request_summary_us_count{model="m",version="1"}'] == 1
    assert 'nv_inference_compute_infer_summary_us{model="m",version="1",quantile="0.5"}' not in found


def test_quantiles_are_read_as_c_reads_numbers() -> None:
    assert settings("summary_quantiles=0.1:0.0.1,0.7:0.01").quantiles == ((0.1, 0.0), (0.7, 0.01))


def test_first_response_buckets_are_the_models_choice() -> None:
    metrics = Metrics(settings("histogram_latencies=true"))
    control = {
        "metric_identifier": {"family": "nv_inference_first_response_histogram_ms"},
        "histogram_options": {"buckets": [10, 20.5]},
    }
    statistics = metrics.open_model(
        config(model_transaction_policy={"decoupled": True}, model_metrics={"metric_control": [control]}), 1
    )
    request = InferRequest("m")
    request.times.received_ns = time.monotonic_ns() - 15_000_000
    statistics.on_response(request, InferResponse())
    found = samples(metrics.render())
    prefix = 'nv_inference_first_response_histogram_ms_bucket{model="m",version="1",le='
    assert [found[f'{prefix}"{bound}"}}'] for bound in ("10", "20.5", "+Inf")] == [0, 1, 1]


def test_saturation_is_the_busy_share_of_the_instances() -> None:
    metrics = Metrics(MetricsSettings(gpu=False, cpu=False, interval_ms=0))
    statistics = metrics.open_model(config(), 1)
    metrics.watch(statistics, lambda: 0, lambda: 2)
    statistics.busy_ns = 10**18
    assert samples(metrics.render())['enginehouse_model_saturation{model="m",version="1"}'] == 1
    assert samples(metrics.render())['enginehouse_model_saturation{model="m",version="1"}'] == 0


@pytest.mark.asyncio
async def test_sources_and_providers_join_in_and_same_families_merge() -> None:
    metrics = Metrics(settings())

    async def engine(name: str) -> Sequence[MetricFamily]:
        return [MetricFamily("vllm:num_requests_running", "gauge", "Running.", [("", {"model_name": name}, 2)])]

    end = metrics.add_source(lambda: engine("a"))
    metrics.add_source(lambda: engine("b"))
    metrics.add_provider(lambda: [MetricFamily("enginehouse_x", "counter", "X.", [("_total", {}, 1)])])
    Counter("third_party", "T.", registry=metrics.registry).inc()
    text = (await metrics.scrape()).decode()
    assert text.count("# TYPE vllm:num_requests_running gauge") == 1
    assert 'vllm:num_requests_running{model_name="b"} 2' in text
    assert "# TYPE enginehouse_x_total counter\nenginehouse_x_total 1" in text
    assert "# TYPE third_party_total counter\nthird_party_total 1" in text
    assert "_created" not in text
    end()
    assert 'model_name="a"' not in (await metrics.scrape()).decode()


@dataclass
class Entry:
    model: str
    version: int
    kind: str
    num_bytes: int


@dataclass
class Device:
    device: str
    total_bytes: int
    limit_bytes: int
    entries: list[Entry]


def test_memory_is_told_by_device_model_and_kind() -> None:
    entries = [Entry("m", 1, "weights", 3), Entry("m", 1, "workspace", 2), Entry("m", 1, "workspace", 2)]
    metrics = Metrics(settings())
    metrics.add_provider(lambda: memory_families([Device("cpu", 100, 50, entries), Device("cuda:0", 9, 9, [])]))
    found = samples(metrics.render())
    assert found['enginehouse_memory_limit_bytes{device="cpu"}'] == 50
    assert found['enginehouse_memory_bytes{device="cpu",kind="weights",model="m",version="1"}'] == 3
    assert found['enginehouse_memory_bytes{device="cpu",kind="workspace",model="m",version="1"}'] == 4


def test_readiness_and_restarts_are_told_by_version() -> None:
    metrics = Metrics(settings())
    metrics.add_provider(lambda: version_families([VersionReading("m", 2, is_ready=False, num_restarts=3)]))
    found = samples(metrics.render())
    assert found['enginehouse_model_ready{model="m",version="2"}'] == 0
    assert found['enginehouse_host_restarts_total{model="m",version="2"}'] == 3


def test_load_times_are_told_of_versions_that_are_ready() -> None:
    metrics = Metrics(settings())
    loaded = VersionReading("m", 1, is_ready=True, num_restarts=0, load_s=2.5)
    metrics.add_provider(lambda: version_families([loaded, VersionReading("m", 2, is_ready=False, num_restarts=0)]))
    found = {name: value for name, value in samples(metrics.render()).items() if "load_duration" in name}
    assert found == {'enginehouse_model_load_duration_seconds{model="m",version="1"}': 2.5}


def test_cpu_readings_are_plausible() -> None:
    found = samples(Metrics(settings()).render())
    assert 0 <= found["nv_cpu_utilization"] <= 1
    assert 0 < found["nv_cpu_memory_used_bytes"] < found["nv_cpu_memory_total_bytes"]


class FakeNvml:
    """Two cards; the second has no power or energy reading, as laptops' have not."""

    class NVMLError(Exception):
        pass

    energy_mj = 5000

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=40)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=100, used=25)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._offered(handle, 70_000)

    def nvmlDeviceGetPowerManagementLimit(self, handle: int) -> int:
        return self._offered(handle, 300_000)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self._offered(handle, self.energy_mj)

    def _offered(self, handle: int, value: int) -> int:
        if handle == 1:
            raise self.NVMLError("Not Supported")
        return value


def test_the_fake_has_the_real_librarys_functions() -> None:
    import pynvml

    for name in vars(FakeNvml):
        if name.startswith("nvml"):
            assert callable(getattr(pynvml, name))
    assert issubclass(pynvml.NVMLError, Exception)


def test_gpus_are_read_at_most_once_an_interval_and_missing_readings_left_out() -> None:
    nvml = FakeNvml()
    reader = GpuReader(nvml, interval_ns=100)
    nvml.energy_mj = 8000

    def read(now_ns: int) -> dict[str, dict[str, float]]:
        return {f.name: {labels["gpu_uuid"]: v for _, labels, v in f.samples} for f in reader.families(now_ns)}

    first = read(0)
    assert set(first) == {name for name, _, _ in GPU_FAMILIES}
    assert first["nv_gpu_utilization"] == {"GPU-0": 0.4, "GPU-1": 0.4}
    assert first["nv_gpu_power_usage"] == {"GPU-0": 70.0}
    assert first["nv_energy_consumption"] == {"GPU-0": 3.0}
    nvml.energy_mj = 9000
    assert read(99)["nv_energy_consumption"] == {"GPU-0": 3.0}
    assert read(100)["nv_energy_consumption"] == {"GPU-0": 4.0}


@pytest.mark.parametrize(
    ("metrics_config", "text"),
    [
        ("latencies=true", "unknown --metrics-config setting 'latencies'"),
        ("summary_quantiles=0.5", "expected summary quantiles as"),
        ("summary_latencies=maybe", "invalid value for bool option: maybe"),
    ],
)
def test_bad_settings_are_refused_at_the_start(metrics_config: str, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        settings(metrics_config)


def test_numbers_are_written_short() -> None:
    assert [number(value) for value in (2.0, 0.5, float("inf"), 1e20)] == ["2", "0.5", "+Inf", "1e+20"]


class TestCustomMetrics:
    def make(self, kind: str = "counter", **labels: str) -> CustomMetrics:
        custom = CustomMetrics()
        custom.call("m", 1, "family", "requests_seen", {}, {"description": "Seen.", "kind": kind})
        custom.call("m", 1, "metric", "requests_seen", labels, [1, 2] if kind == "histogram" else None)
        return custom

    def test_a_counter_goes_up(self) -> None:
        custom = self.make(model="m")
        custom.call("m", 1, "increment", "requests_seen", {"model": "m"}, 2.5)
        assert custom.call("m", 1, "value", "requests_seen", {"model": "m"}, None) == 2.5
        (family,) = custom.families()
        assert (family.kind, family.help) == ("counter", "Seen.")
        assert list(family.samples) == [("", {"model": "m"}, 2.5)]

    def test_a_gauge_is_set_and_moved(self) -> None:
        custom = self.make("gauge")
        custom.call("m", 1, "set", "requests_seen", {}, 10)
        custom.call("m", 1, "increment", "requests_seen", {}, -3)
        assert custom.call("m", 1, "value", "requests_seen", {}, None) == 7

    def test_a_histogram_counts_in_buckets(self) -> None:
        custom = self.make("histogram")
        for value in (0.5, 1, 1.5, 9):
            custom.call("m", 1, "observe", "requests_seen", {}, value)
        (family,) = custom.families()
        assert [(suffix, labels.get("le"), value) for suffix, labels, value in family.samples] == [
            ("_bucket", "1", 2),
            ("_bucket", "2", 3),
            ("_bucket", "+Inf", 4),
            ("_count", None, 4),
            ("_sum", None, 12),
        ]

    @pytest.mark.parametrize(
        ("kind", "operation", "value", "error"),
        [
            ("counter", "increment", -1, InvalidArgument),
            ("counter", "set", 1, Unsupported),
            ("counter", "observe", 1, Unsupported),
            ("gauge", "observe", 1, Unsupported),
            ("histogram", "increment", 1, Unsupported),
            ("histogram", "set", 1, Unsupported),
            ("histogram", "value", None, Unsupported),
            ("gauge", "frobnicate", 1, InvalidArgument),
            ("gauge", "metric", [1, 2], Unsupported),
            ("histogram", "metric", None, InvalidArgument),
            ("histogram", "metric", [2, 1], InvalidArgument),
        ],
    )
    def test_what_a_kind_can_not_do(
        self, kind: str, operation: str, value: object, error: type[EnginehouseError]
    ) -> None:
        with pytest.raises(error):
            self.make(kind).call("m", 1, operation, "requests_seen", {}, value)

    def test_names_are_checked_before_they_can_spoil_the_exposition(self) -> None:
        with pytest.raises(InvalidArgument, match="'a b' is no name"):
            CustomMetrics().call("m", 1, "family", "a b", {}, {"description": "", "kind": "gauge"})
        with pytest.raises(InvalidArgument, match="'a-b' is no name for a label"):
            self.make("gauge").call("m", 1, "metric", "requests_seen", {"a-b": "x"}, None)

    def test_a_metric_stays_until_the_last_instance_lets_it_go(self) -> None:
        custom = self.make(model="m")
        custom.call("m", 1, "family", "requests_seen", {}, {"description": "Seen.", "kind": "counter"})
        custom.call("m", 1, "metric", "requests_seen", {"model": "m"}, None)
        custom.call("m", 1, "increment", "requests_seen", {"model": "m"}, 1)
        custom.call("m", 1, "remove_metric", "requests_seen", {"model": "m"}, None)
        custom.call("m", 1, "remove_family", "requests_seen", {}, None)
        assert custom.call("m", 1, "value", "requests_seen", {"model": "m"}, None) == 1
        custom.call("m", 1, "remove_metric", "requests_seen", {"model": "m"}, None)
        custom.call("m", 1, "remove_family", "requests_seen", {}, None)
        assert list(custom.families()) == []

    def test_models_share_a_family_and_it_goes_with_the_last(self) -> None:
        custom = self.make(model="m")
        custom.call("n", 2, "family", "requests_seen", {}, {"description": "", "kind": "COUNTER"})
        custom.call("n", 2, "metric", "requests_seen", {"model": "n"}, None)
        with pytest.raises(AlreadyExists):
            custom.call("n", 2, "family", "requests_seen", {}, {"description": "", "kind": "gauge"})
        custom.drop_owner("m", 1)
        (family,) = custom.families()
        assert [labels for _, labels, _ in family.samples] == [{"model": "n"}]
        custom.drop_owner("n", 2)
        assert list(custom.families()) == []
        with pytest.raises(NotFound):
            custom.call("n", 2, "increment", "requests_seen", {"model": "n"}, 1)
