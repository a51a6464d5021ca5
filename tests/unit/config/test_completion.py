"""What follows from what: backends, files, defaults, and what a backend may fill in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from enginehouse.config.artifacts import Artifacts, inspect_model
from enginehouse.config.completion import at_load, at_poll, complete_backend, merge_found, normalise
from enginehouse.config.reading import parse_config
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import Internal, InvalidArgument


def completed(text: str = "", name: str = "m", files: tuple[str, ...] = ()) -> tuple[str, str, str]:
    artifacts = Artifacts(files=frozenset(files))
    config = complete_backend(parse_config(text, ".pbtxt").config, name, artifacts)
    assert config.name == name
    return config.backend, config.platform, config.default_model_filename


ONNX = ("onnxruntime", "onnxruntime_onnx", "model.onnx")
TORCH = ("pytorch", "pytorch_libtorch", "model.pt")


@pytest.mark.parametrize(
    ("text", "files", "expected"),
    [
        ("", ("model.onnx",), ONNX),
        ('platform: "onnxruntime_onnx"', (), ONNX),
        ('backend: "onnxruntime"', (), ONNX),
        ('default_model_filename: "model.onnx"', (), ONNX),
        ('backend: "onnxruntime" default_model_filename: "net.onnx"', (), (*ONNX[:2], "net.onnx")),
        ('default_model_filename: "net.onnx"', (), (*ONNX[:2], "net.onnx")),
        ("", ("net.onnx", "README.md"), (*ONNX[:2], "net.onnx")),
        ("", ("model.plan",), ("tensorrt", "tensorrt_plan", "model.plan")),
        ('platform: "tensorrt_plan"', (), ("tensorrt", "tensorrt_plan", "model.plan")),
        ("", ("model.pt",), TORCH),
        ('platform: "pytorch_libtorch"', (), TORCH),
        ('backend: "pytorch"', (), TORCH),
        ('backend: "pytorch"', ("model.pt2",), ("pytorch", "torch_export", "model.pt2")),
        ("", ("model.pt2",), ("pytorch", "torch_export", "model.pt2")),
        ('backend: "pytorch" default_model_filename: "net.pt2"', (), ("pytorch", "torch_export", "net.pt2")),
        ("", ("model.pt", "model.py"), TORCH),
        ("", ("model.py",), ("python", "", "model.py")),
        ('backend: "python"', (), ("python", "", "model.py")),
        ('backend: "python" default_model_filename: "main.py"', (), ("python", "", "main.py")),
        ("", ("model.json",), ("vllm", "", "model.json")),
        ('backend: "vllm"', (), ("vllm", "", "model.json")),
        ('backend: "identity"', (), ("identity", "", "")),
        ('platform: "ensemble"', (), ("", "ensemble", "")),
    ],
)
def test_backend_follows_from_platform_filename_or_files(
    text: str, files: tuple[str, ...], expected: tuple[str, str, str]
) -> None:
    assert completed(text, files=files) == expected


def test_a_custom_backend_may_follow_from_the_models_name() -> None:
    assert completed(name="net.identity") == ("identity", "", "model.identity")


def test_nothing_to_go_by_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="Could not determine backend for model 'm' with no backend"):
        completed(files=("a.onnx", "b.onnx"))


@pytest.mark.parametrize(
    ("architecture", "extra", "backend"),
    [
        ("LlamaForCausalLM", [], "llm"),
        ("GPT2LMHeadModel", [], "llm"),
        ("BertForSequenceClassification", [], "transformers"),
        ("Qwen2ForCausalLM", ["modules.json"], "transformers"),
    ],
)
def test_a_hugging_face_folder_tells_its_backend(
    tmp_path: Path, architecture: str, extra: list[str], backend: str
) -> None:
    version = tmp_path / "chat" / "1"
    version.mkdir(parents=True)
    (version / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "x"}))
    for name in extra:
        (version / name).write_text("[]")
    assert at_poll(ModelConfig(), tmp_path / "chat").backend == backend


def test_versions_are_whole_numbers_without_leading_zeros(tmp_path: Path) -> None:
    for name in ("01", "1_Pooling", "configs", "3", "٣"):
        (tmp_path / name).mkdir()
    (tmp_path / "3" / "model.py").touch()
    (tmp_path / "2").touch()
    assert inspect_model(tmp_path).files == {"model.py"}


def test_defaults_are_tritons() -> None:
    config = normalise(ModelConfig(max_batch_size=6, name="m"))
    assert config.version_policy.latest.num_versions == 1
    assert config.optimization.input_pinned_memory.enable
    config.dynamic_batching.SetInParent()
    assert list(normalise(config).dynamic_batching.preferred_batch_size) == [6]
    config.sequence_batching.oldest.max_candidate_sequences = 2
    config = normalise(config)
    assert config.sequence_batching.max_sequence_idle_microseconds == 1_000_000
    assert list(config.sequence_batching.oldest.preferred_batch_size) == [6]
    assert normalise(config) == config


def test_an_ensemble_gets_no_optimization_block() -> None:
    config = ModelConfig(platform="ensemble")
    config.ensemble_scheduling.SetInParent()
    assert not normalise(config).HasField("optimization")


def test_a_backend_fills_in_what_it_may() -> None:
    config = normalise(ModelConfig(name="m", backend="python"))
    found = ModelConfig(name="other", backend="other", max_batch_size=4)
    found.input.add(name="X")
    found.dynamic_batching.SetInParent()
    found.model_transaction_policy.decoupled = True
    merged = merge_found(config, found)
    assert (merged.name, merged.backend, merged.max_batch_size) == ("m", "python", 4)
    assert merged.input[0].name == "X"
    assert list(merged.dynamic_batching.preferred_batch_size) == [4]
    assert merged.model_transaction_policy.decoupled


def test_a_backend_may_not_change_the_scheduler() -> None:
    config = ModelConfig()
    config.sequence_batching.SetInParent()
    with pytest.raises(Internal, match=r"^Cannot update scheduling choice from 13 to 13 when auto-completing\.$"):
        merge_found(config, ModelConfig())


def test_each_version_tells_its_own_artifact(tmp_path: Path) -> None:
    for number, file in (("1", "model.pt"), ("2", "model.pt2")):
        (tmp_path / "m" / number).mkdir(parents=True)
        (tmp_path / "m" / number / file).touch()
    config = at_poll(ModelConfig(backend="onnxruntime"), tmp_path / "m")
    assert at_load(config, tmp_path / "m" / "2") == config
    assert at_poll(ModelConfig(), tmp_path / "m").default_model_filename == "model.pt"
