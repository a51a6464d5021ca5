"""What deploy/ and the operations pages say is true of the server: flags, probes, metrics, generated files."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from enginehouse.observe.catalogue import catalogue
from enginehouse.options import ServerOptions, parse_options

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(path for path in DEPLOY.rglob("*.yaml") if "templates" not in path.parts)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DEPLOY / "grafana" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def argument_lists(node: Any) -> Iterator[list[str]]:
    """Every `args` or `command` of containers, wherever it is."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("args", "command") and isinstance(value, list):
                yield [str(each) for each in value]
            else:
                yield from argument_lists(value)
    elif isinstance(node, list):
        for each in node:
            yield from argument_lists(each)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_manifests_are_yaml_and_their_flags_are_the_servers(path: Path) -> None:
    for document in documents(path):
        for arguments in argument_lists(document):
            parse_options(arguments, {})


def test_a_pod_gets_the_time_that_its_flags_take_to_drain() -> None:
    deployment = documents(DEPLOY / "kubernetes" / "base" / "enginehouse.yaml")[0]
    pod = deployment["spec"]["template"]["spec"]
    options: ServerOptions = parse_options(pod["containers"][0]["args"], {})
    assert pod["terminationGracePeriodSeconds"] > options.drain_delay_secs + options.exit_timeout_secs
    compose = documents(DEPLOY / "docker" / "compose.yaml")[0]["services"]["enginehouse"]
    options = parse_options(compose["command"], {})
    assert int(compose["stop_grace_period"].removesuffix("s")) > options.drain_delay_secs + options.exit_timeout_secs


def test_ports_of_the_manifests_are_those_of_the_flags() -> None:
    pod, service = documents(DEPLOY / "kubernetes" / "base" / "enginehouse.yaml")[:2]
    container = pod["spec"]["template"]["spec"]["containers"][0]
    options = parse_options(container["args"], {})
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {
        "http": options.http_port,
        "grpc": options.grpc_port,
        "metrics": options.metrics_port,
    }
    assert {each["name"] for each in service["spec"]["ports"]} == set(ports)


def metric_names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:nv_|enginehouse_|vllm:)\w+", text))


def exposed_names() -> set[str]:
    """With the suffixes that samples have."""
    return {family.name + suffix for family in catalogue() for suffix, _, _ in family.samples}


@pytest.mark.parametrize(
    "path", [DEPLOY / "prometheus" / "alerts.yaml", DEPLOY / "keda" / "scaled-object.yaml"], ids=lambda path: path.name
)
def test_alerts_and_scaling_ask_for_metrics_that_there_are(path: Path) -> None:
    names = metric_names(path.read_text())
    assert names
    assert names <= exposed_names()


def test_dashboard_and_table_are_as_the_generator_makes_them_now(generator: ModuleType) -> None:
    for path, text in generator.outputs().items():
        assert path.read_text() == text, f"stale: run python deploy/grafana/generate.py ({path.name})"


def test_every_family_has_a_panel_and_no_panel_asks_for_what_there_is_not(generator: ModuleType) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "enginehouse.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    asked = {name for panel in panels for target in panel["targets"] for name in metric_names(target["expr"])}
    exposed = {f.name + suffix for f in generator.families() for suffix, _, _ in f.samples}
    assert asked <= exposed
    assert {f.name for f in generator.families()} == {panel["description"].split(": ")[0] for panel in panels}


def test_panels_have_their_own_numbers_and_places() -> None:
    panels = json.loads((DEPLOY / "grafana" / "enginehouse.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_a_new_metric_can_not_be_forgotten(generator: ModuleType) -> None:
    family = type(catalogue()[0])("other_family", "gauge", "", [("", {}, 0)])
    with pytest.raises(SystemExit, match="other_family"):
        generator.dashboard([family])


def command_lines(text: str) -> Iterator[list[str]]:
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("name", ["operations.md", "metrics.md"])
def test_commands_in_the_pages_have_flags_that_there_are(name: str) -> None:
    for words in command_lines((ROOT / "docs" / name).read_text()):
        if words[:2] == ["enginehouse", "serve"]:
            parse_options(words[2:], {})


def test_the_options_file_in_the_page_can_be_read(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), flags=re.DOTALL)
    (tmp_path / "server.yaml").write_text(block)
    options = parse_options([f"--config-file={tmp_path / 'server.yaml'}"], {})
    assert options.model_repository == ("/models", "/more-models")
    assert options.caches == {"local": {"size": "268435456"}}


def test_flags_that_the_pages_name_are_flags() -> None:
    from enginehouse.options import usage

    known = set(re.findall(r"--([a-z0-9-]+) <", usage()))
    for name in ("operations.md", "metrics.md"):
        named = set(re.findall(r"`--([a-z0-9-]+)", (ROOT / "docs" / name).read_text()))
        assert named - {"build-arg"} <= known
