"""--model-namespacing: models of one name in two repositories, each ensemble with those beside it."""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from enginehouse.testing.server import ServerProcess

from .test_layouts import adder
from .test_poll import wait_for

MEMBER = 'input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 } '
ENSEMBLE = (
    'platform: "ensemble" max_batch_size: 1 '
    + MEMBER
    + 'ensemble_scheduling { step { model_name: "member" model_version: -1 '
    'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }'
)


def write(root: Path, name: str, added: float) -> Path:
    """A repository with `member`, which adds something, and the ensemble `name` over it."""
    import onnx

    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(ENSEMBLE)
    (root / "member" / "1").mkdir(parents=True)
    (root / "member" / "config.pbtxt").write_text("max_batch_size: 1 " + MEMBER)
    onnx.save(adder(added), str(root / "member" / "1" / "model.onnx"))
    return root


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "one", "first", 1), write(tmp_path / "two", "second", 2)]


def asker(server: ServerProcess) -> Callable[[str], float]:
    client = http.InferenceServerClient(server.http)

    def ask(name: str) -> float:
        tensor = http.InferInput("x", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.zeros([1, 1], np.float32))
        return float(client.infer(name, [tensor]).as_numpy("y")[0, 0])

    return ask


def check_both(ask: Callable[[str], float]) -> None:
    assert [ask("first"), ask("second")] == [1, 2]
    with pytest.raises(InferenceServerException, match=r"There are 2 identifiers of model 'member'.*ambiguity"):
        ask("member")


def test_all_are_served_and_a_name_may_be_ambiguous(roots: list[Path]) -> None:
    with ServerProcess(roots, ["--model-namespacing=true"]) as server:
        check_both(asker(server))
        client = http.InferenceServerClient(server.http)
        assert client.get_model_metadata("first")["name"] == "first"
        index = [(entry["name"], entry["state"]) for entry in client.get_model_repository_index()]
        statistics = {(one["name"], one["version"]) for one in client.get_inference_statistics()["model_stats"]}
        assert statistics == {("first", "1"), ("second", "1"), ("member", "1")}
        metrics = urllib.request.urlopen(server.metrics_url).read().decode()
        assert f'nv_inference_count{{model="member",namespace="{roots[1]}",version="1"}} 1' in metrics
        assert sorted(index) == [("first", "READY"), ("member", "READY"), ("member", "READY"), ("second", "READY")]


def test_without_namespaces_a_name_serves_from_one_repository_alone(roots: list[Path], tmp_path: Path) -> None:
    flags = ["--model-control-mode=poll", "--repository-settle-ms=100", "--exit-on-error=false"]
    shutil.move(roots[1], tmp_path / "away")
    roots[1].mkdir()
    with ServerProcess(roots, flags) as server:
        client, ask = http.InferenceServerClient(server.http), asker(server)
        assert ask("member") == 1
        shutil.move(tmp_path / "away" / "member", roots[1] / "member")
        wait_for(lambda: _answers(ask, "member") is None, "the end of the ambiguous model")
        found = {entry["name"]: entry for entry in client.get_model_repository_index()}
        assert found["member"] == {
            "name": "member",
            "state": "UNAVAILABLE",
            "reason": "model appears in two or more repositories",
        }
        shutil.move(roots[0] / "member", tmp_path / "gone")
        wait_for(lambda: _answers(ask, "member") == 2, "the model of the other repository")


def test_explicit_loads_find_the_member_that_is_there(roots: list[Path], tmp_path: Path) -> None:
    flags = ["--model-namespacing=true", "--model-control-mode=explicit"]
    shutil.move(roots[0] / "member", tmp_path / "away")
    with ServerProcess(roots, flags) as server:
        client, ask = http.InferenceServerClient(server.http), asker(server)
        for name in ("first", "second"):
            client.load_model(name)
        assert [ask("first"), ask("second"), ask("member")] == [2, 2, 2]
        shutil.move(tmp_path / "away", roots[0] / "member")
        client.load_model("first")
        check_both(ask)


def test_members_that_come_and_go_are_found_again(roots: list[Path], tmp_path: Path) -> None:
    flags = ["--model-namespacing=true", "--model-control-mode=poll", "--repository-settle-ms=100"]
    with ServerProcess(roots, flags) as server:
        ask = asker(server)
        check_both(ask)
        shutil.move(roots[0] / "member", tmp_path / "away")
        wait_for(lambda: _answers(ask, "first") == 2, "the other repository's member")
        assert [ask("second"), ask("member")] == [2, 2]
        shutil.move(tmp_path / "away", roots[0] / "member")
        wait_for(lambda: _answers(ask, "first") == 1, "the member beside it")
        check_both(ask)


def _answers(ask: Callable[[str], float], name: str) -> float | None:
    try:
        return ask(name)
    except InferenceServerException:
        return None
