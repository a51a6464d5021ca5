"""`enginehouse convert`: which shapes a plan is built for, and what the builder is told. No GPU, no builder."""

from __future__ import annotations

import enum
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from enginehouse.errors import EnginehouseError, Internal, InvalidArgument, Unsupported
from enginehouse_backends.onnx_runtime.onnx_file import OnnxValue
from enginehouse_backends.tensorrt_engine.convert import (
    Settings,
    build,
    builder_flags,
    complete_profile,
    convert,
    parse_shapes,
    parse_size,
)
from enginehouse_backends.tensorrt_engine.profiles import Range

from . import onnx_models
from .fake_tensorrt import make_library
from .tensorrt_signatures import check_call, recorded

VERSIONS = sorted(recorded())
IMAGE = OnnxValue("image", 1, ("batch", 3, 8, 8))
IDS = OnnxValue("ids", 7, ("batch", "length"))


def test_shapes_are_least_best_and_most_or_one_size() -> None:
    assert parse_shapes("ids=1x16:8x128:32x512") == ("ids", Range((1, 16), (8, 128), (32, 512)))
    assert parse_shapes("ids=4x8") == ("ids", Range((4, 8), (4, 8), (4, 8)))


@pytest.mark.parametrize("text", ["ids", "ids=", "ids=1x2:3x4", "ids=1xa", "ids=1:2:3:4", "ids=2:1:3", "ids=1x2:3:4x5"])
def test_shapes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=f"--shapes {text}"):
        parse_shapes(text)


def test_free_batch_goes_from_one_to_the_largest() -> None:
    assert complete_profile([IMAGE], {}, 16) == {"image": Range((1, 3, 8, 8), (8, 3, 8, 8), (16, 3, 8, 8))}
    assert complete_profile([OnnxValue("x", 1, (2, 3))], {}, 16) == {}


def test_other_free_sizes_must_be_given_and_fit() -> None:
    held = Range((1, 16), (8, 128), (32, 512))
    assert complete_profile([IDS], {"ids": held}, 8) == {"ids": held}
    with pytest.raises(InvalidArgument, match=r"'ids' has the shape \[-1, -1\]: say which sizes .* --shapes ids="):
        complete_profile([IDS], {}, 8)
    with pytest.raises(InvalidArgument, match=r"doesn't fit the file's \[-1, 3, 8, 8\]"):
        complete_profile([IMAGE], {"image": Range((1, 4, 8, 8), (1, 4, 8, 8), (1, 4, 8, 8))}, 8)
    with pytest.raises(InvalidArgument, match="--shapes other: the file's inputs are ids"):
        complete_profile([IDS], {"other": held}, 8)


def test_sizes_have_units() -> None:
    assert [parse_size(text) for text in ("7", "2KiB", "4GiB")] == [7, 2048, 4 << 30]
    with pytest.raises(InvalidArgument, match="4GB is no size"):
        parse_size("4GB")


@pytest.mark.parametrize("version", VERSIONS)
def test_precision_is_a_flag_where_tensorrt_still_has_one(version: str) -> None:
    library = make_library(version)
    settings = Settings(Path("a"), Path("b"), [], precision="fp16", is_version_compatible=True)
    if hasattr(library.BuilderFlag, "FP16"):
        assert [flag.name for flag in builder_flags(library, settings)] == ["FP16", "VERSION_COMPATIBLE"]
    else:
        with pytest.raises(Unsupported, match="export it in fp16 and convert it as it is"):
            builder_flags(library, settings)


class Recorder:
    """Stands for the builder's objects, whose signatures can't be had: keeps what is called and set."""

    def __init__(self, name: str, calls: list[Any], version: str, answers: dict[str, Any]) -> None:
        self.__dict__.update(_name=name, _calls=calls, _version=version, _answers=answers)

    def __setattr__(self, name: str, value: Any) -> None:
        self._calls.append((f"{self._name}.{name}", (value,)))
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            method = f"{self._name}.{name}"
            if self._name == "IOptimizationProfile":
                check_call(self._version, method, arguments)
            self._calls.append((method, arguments))
            return self._answers.get(method)

        return call


def building_library(version: str, plan: bytes | None = b"a plan", parses: bool = True) -> tuple[Any, list[Any]]:
    library, calls = make_library(version), list[Any]()
    answers: dict[str, Any] = {"IBuilder.build_serialized_network": plan, "IParser.parse_from_file": parses}
    objects = ("IBuilder", "IBuilderConfig", "IOptimizationProfile", "IParser", "INetwork")
    made = {name: Recorder(name, calls, version, answers) for name in objects}
    answers["IBuilder.create_network"] = made["INetwork"]
    answers["IBuilder.create_builder_config"] = made["IBuilderConfig"]
    answers["IBuilder.create_optimization_profile"] = made["IOptimizationProfile"]
    made["IParser"].__dict__["num_errors"] = 0
    library.Builder = lambda logger: made["IBuilder"]
    library.OnnxParser = lambda network, logger: made["IParser"]
    library.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
    return library, calls


@pytest.mark.parametrize("version", VERSIONS)
def test_builder_gets_profiles_limits_and_a_progress_monitor(version: str, tmp_path: Path) -> None:
    library, calls = building_library(version)
    profile = complete_profile([IMAGE], {}, 4)
    settings = Settings(tmp_path / "a.onnx", tmp_path / "out" / "a.plan", [profile], workspace_bytes=77)
    build(library, settings, Console(file=io.StringIO()))
    assert settings.target.read_bytes() == b"a plan"
    called = dict(calls)
    assert called["IBuilderConfig.set_memory_pool_limit"] == (library.MemoryPoolType.WORKSPACE, 77)
    assert called["IOptimizationProfile.set_shape"] == ("image", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))
    (monitor,) = called["IBuilderConfig.progress_monitor"]
    monitor.phase_start("Building", None, 3)
    assert monitor.step_complete("Building", 0) is True
    monitor.stop()
    assert monitor.step_complete("Building", 1) is False
    monitor.phase_finish("Building")
    monitor.phase_finish("never started")


@pytest.mark.parametrize(
    ("plan", "parses", "error", "message"),
    [(None, True, Internal, "can't build .*a.onnx"), (b"x", False, Unsupported, "can't read .*a.onnx")],
)
def test_failed_build_writes_nothing(
    tmp_path: Path, plan: bytes | None, parses: bool, error: type[EnginehouseError], message: str
) -> None:
    library, _ = building_library(VERSIONS[0], plan, parses)
    settings = Settings(tmp_path / "a.onnx", tmp_path / "a.plan", [])
    with pytest.raises(error, match=message):
        build(library, settings, Console(file=io.StringIO()))
    assert not settings.target.exists()


def test_machine_without_a_gpu_is_told_so_after_its_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = onnx_models.identity(tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "tensorrt", make_library(VERSIONS[0]))
    command = [str(source), str(tmp_path / "a.plan")]
    answer = CliRunner().invoke(convert, [*command, "--shapes", "INPUT=1x5"])
    assert (answer.exit_code, "doesn't fit the file's [-1, 4]" in answer.output) == (1, True)
    answer = CliRunner().invoke(convert, command)
    assert (answer.exit_code, "TensorRT needs an NVIDIA GPU" in answer.output) == (1, True)


@pytest.mark.parametrize("version", VERSIONS)
def test_enums_that_we_name_exist(version: str) -> None:
    library: Any = make_library(version)
    for kind, name in (
        ("MemoryPoolType", "WORKSPACE"), ("HardwareCompatibilityLevel", "AMPERE_PLUS"),
        ("BuilderFlag", "VERSION_COMPATIBLE"), ("TensorLocation", "HOST"), ("TensorIOMode", "INPUT"),
    ):  # fmt: skip
        assert isinstance(getattr(library, kind)[name], enum.Enum)
