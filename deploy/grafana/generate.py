"""Makes the Grafana dashboard and the table in docs/metrics.md from the metrics that the server really exposes.

    python deploy/grafana/generate.py            # writes both
    python deploy/grafana/generate.py --check    # says what is stale, writes nothing

A family gets a panel by its kind: counters as rates, histograms as quantiles, gauges as they are. A family
that fits no row fails the run, so a new metric can't be forgotten.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from enginehouse.observe.catalogue import catalogue, labels_of
from enginehouse.types import MetricFamily
from enginehouse_backends.llm.metrics import LlmMetrics

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "enginehouse.json"
DOCUMENT = ROOT / "docs" / "metrics.md"

ROWS: tuple[tuple[str, str], ...] = (
    ("Requests", r"nv_inference_(request_(success|failure)|count|exec_count|pending_request_count)$"),
    ("Latency", r"enginehouse_(request|queue|compute)_duration_seconds|nv_inference_\w+_(duration_us|histogram_ms)"),
    ("Latency summaries (--metrics-config=summary_latencies=true)", r"nv_\w+_summary\w*"),
    ("Batching and load", r"enginehouse_(batch_size|requests_refused|model_saturation)"),
    ("Response cache", r"nv_cache_\w+"),
    ("Language models", r"vllm:\w+"),
    ("Models and hosts", r"enginehouse_(model_ready|model_load_duration_seconds|host_restarts|build_info|tensors_\w+)"),
    ("Memory", r"enginehouse_memory_\w+|nv_pinned_memory\w+"),
    ("CPU", r"nv_cpu_\w+"),
    ("GPU", r"nv_gpu_\w+|nv_energy_consumption"),
)
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def families() -> list[MetricFamily]:
    """The server's and those of language models."""
    return [*catalogue(), *LlmMetrics("model", 4096, {}).families()]


# --- the dashboard


def dashboard(all_families: Sequence[MetricFamily]) -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    top = 0
    for title, members in _by_row(all_families):
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
             "gridPos": {"x": 0, "y": top, "w": _COLUMNS, "h": 1}}
        )  # fmt: skip
        top += 1
        for index, family in enumerate(members):
            x = index * _WIDTH % _COLUMNS
            y = top + index * _WIDTH // _COLUMNS * _HEIGHT
            panels.append(_panel(family, len(panels) + 1, {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT}))
        top += -(-len(members) * _WIDTH // _COLUMNS) * _HEIGHT
    return {
        "title": "Enginehouse",
        "uid": "enginehouse",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "tags": ["enginehouse"],
        "templating": {"list": [_source_variable(), _model_variable()]},
        "panels": panels,
    }


def _by_row(all_families: Iterable[MetricFamily]) -> list[tuple[str, list[MetricFamily]]]:
    rows: dict[str, list[MetricFamily]] = {title: [] for title, _ in ROWS}
    for family in all_families:
        for title, pattern in ROWS:
            if re.fullmatch(pattern.rstrip("$"), family.name):
                rows[title].append(family)
                break
        else:
            raise SystemExit(f"no row of the dashboard is for '{family.name}': add it to ROWS")
    return [(title, members) for title, members in rows.items() if members]


def _panel(family: MetricFamily, number: int, position: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": _title(family),
        "description": f"{family.name}: {family.help}",
        "datasource": _SOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": {"unit": _unit(family), "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull"]}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(_queries(family))
        ],
    }


def _title(family: MetricFamily) -> str:
    words = re.sub(r"^(nv_|enginehouse_|vllm:)|_(seconds|us|total|bytes)$", "", family.name).replace("_", " ")
    words = words.replace("inference ", "") or family.name
    return words[0].upper() + words[1:]


def _unit(family: MetricFamily) -> str:
    name = family.name
    if "bytes" in name:
        return "bytes"
    if name.endswith("_seconds"):
        return "s"
    if name.endswith(("_us", "summary_per_model")) or re.search(r"_duration(_us|_per_model)?$", name):
        return "µs"
    if name.endswith("_ms"):
        return "ms"
    if "utilization" in name or name.endswith(("_util", "_saturation", "_perc")):
        return "percentunit"
    if name.endswith(("power_usage", "power_limit")) or name == "nv_energy_consumption":
        return "watt"
    return "short" if family.kind != "counter" else "cps"


def _queries(family: MetricFamily) -> list[tuple[str, str]]:
    """(expression, legend) by the family's kind."""
    labels = labels_of(family)
    chosen = '{model=~"$model"}' if "model" in labels else '{model_name=~"$model"}' if "model_name" in labels else ""
    legend = " ".join(f"{{{{{label}}}}}" for label in labels) or family.name
    by = ", ".join(labels)
    match family.kind:
        case "counter":
            name = family.name + ("_total" if family.samples[0][0] == "_total" else "")
            rate = f"sum by ({by}) (rate({name}{chosen}[$__rate_interval]))"
            per = _denominator(family)
            if per:
                rate += f" / sum by ({by}) (rate({per}{chosen}[$__rate_interval]))"
            return [(rate, legend)]
        case "histogram":
            grouped = ", ".join(["le", *labels])
            buckets = f"sum by ({grouped}) (rate({family.name}_bucket{chosen}[$__rate_interval]))"
            return [(f"histogram_quantile({q}, {buckets})", f"p{q * 100:g} {legend}") for q in (0.5, 0.9, 0.99)]
        case "summary":
            return [(f"{family.name}{chosen}", f"q{{{{quantile}}}} {legend}")]
    return [(f"{family.name}{chosen}", legend)]


def _denominator(family: MetricFamily) -> str:
    """What a sum of durations is to be divided by, so that the panel shows one request's."""
    if family.name in ("nv_cache_hit_duration_per_model", "nv_cache_miss_duration_per_model"):
        kind = "hits" if "hit" in family.name else "misses"
        return f"nv_cache_num_{kind}_per_model"
    return "nv_inference_request_success" if family.name.endswith("_duration_us") else ""


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _model_variable() -> dict[str, Any]:
    return {
        "name": "model",
        "type": "query",
        "label": "Model",
        "datasource": _SOURCE,
        "query": {"query": "label_values(nv_inference_request_success, model)", "refId": "model"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


# --- the table


def table(all_families: Iterable[MetricFamily]) -> str:
    lines = ["| name | kind | labels | meaning |", "|---|---|---|---|"]
    for family in all_families:
        suffix = "_total" if family.kind == "counter" and family.samples[0][0] == "_total" else ""
        labels = ", ".join(f"`{label}`" for label in labels_of(family)) or "–"
        lines.append(f"| `{family.name}{suffix}` | {family.kind} | {labels} | {family.help.rstrip('.')} |")
    return "\n".join(lines)


def document(text: str, all_families: Iterable[MetricFamily]) -> str:
    block = f"<!-- families -->\n{table(all_families)}\n<!-- /families -->"
    return re.sub(r"<!-- families -->.*?<!-- /families -->", lambda _: block, text, flags=re.DOTALL)


def outputs() -> dict[Path, str]:
    """What each generated file should hold now."""
    all_families = families()
    return {
        DASHBOARD: json.dumps(dashboard(all_families), indent=1, ensure_ascii=False) + "\n",
        DOCUMENT: document(DOCUMENT.read_text(), all_families),
    }


def main() -> None:
    stale = [path for path, text in outputs().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        if stale:
            raise SystemExit("stale: " + ", ".join(str(path.relative_to(ROOT)) for path in stale))
        return
    for path, text in outputs().items():
        path.write_text(text)
    print("written: " + (", ".join(str(path.relative_to(ROOT)) for path in stale) or "nothing was stale"))


if __name__ == "__main__":
    main()
