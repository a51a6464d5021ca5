"""The PyTorch backend against the plug-in contract; what all backends share is in tests/conformance."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import save_file

from enginehouse.backend import HostKind, LoadContext, Placement, TensorInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import Internal, InvalidArgument, NotFound
from enginehouse.types import Tensor
from enginehouse_backends.pytorch import PyTorchBackend
from enginehouse_backends.pytorch.instance import TorchDeviceData

from . import torch_models

BACKEND = PyTorchBackend()


def config_of(text: str = "") -> ModelConfig:
    return text_format.Parse(f'name: "m" {text}', ModelConfig())


def context_of(folder: Path, text: str = "") -> LoadContext:
    context = LoadContext(config_of(text), 1, folder)
    return LoadContext(BACKEND.complete_config(context), 1, folder)


def instance_of(folder: Path, text: str = "") -> TensorInstance:
    instance = BACKEND.load(context_of(folder, text)).create_instance(Placement("m_0"))
    assert isinstance(instance, TensorInstance)
    return instance


def tensors(**arrays: Any) -> dict[str, Tensor]:
    return {name: Tensor.from_numpy(name, np.asarray(array)) for name, array in arrays.items()}


def floats(*values: float) -> Any:
    return np.array([values], dtype=np.float32)


def entry(kind: str, name: str, dims: str = "[4]", datatype: str = "TYPE_FP32", more: str = "") -> str:
    return f'{kind} {{ name: "{name}" data_type: {datatype} dims: {dims} {more} }} '


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }} '


# --- names ---------------------------------------------------------------------------------------------

SUM_OUTPUTS = entry("output", "OUTPUT__0") + entry("output", "OUTPUT__1")


@pytest.mark.parametrize(
    ("left", "right"), [("left", "right"), ("INPUT__0", "INPUT__1"), ("INPUT__1", "INPUT__0"), ("a", "b")]
)
def test_inputs_go_by_argument_name_by_index_or_by_order(tmp_path: Path, left: str, right: str) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.SumAndDifference())
    text = "max_batch_size: 4 " + entry("input", left) + entry("input", right) + SUM_OUTPUTS
    results = instance_of(tmp_path, text).run(tensors(**{left: floats(5, 5, 5, 5), right: floats(1, 2, 3, 4)}), [])
    swapped = left == "INPUT__1"
    assert results["OUTPUT__0"].numpy().tolist() == [[6, 7, 8, 9]]
    assert results["OUTPUT__1"].numpy().tolist() == ([[-4, -3, -2, -1]] if swapped else [[4, 3, 2, 1]])


def test_outputs_in_another_order_than_the_models_go_by_index(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.SumAndDifference())
    text = (
        entry("input", "left") + entry("input", "right") + entry("output", "difference__1") + entry("output", "sum__0")
    )
    results = instance_of(tmp_path, text).run(tensors(left=floats(3)[0], right=floats(1)[0]), ["sum__0"])
    assert {name: tensor.numpy().tolist() for name, tensor in results.items()} == {"sum__0": [4]}


def test_dictionary_model_takes_and_gives_tensors_by_key(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.FromDict())
    text = entry("input", "b") + entry("input", "a") + entry("output", "total")
    assert instance_of(tmp_path, text).run(tensors(a=floats(1), b=floats(2)), [])["total"].numpy() == 3


def test_argument_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.WithDefault())
    text = entry("input", "x") + entry("input", "scale", more="optional: true") + entry("output", "y")
    instance = instance_of(tmp_path, text)
    assert instance.run(tensors(x=floats(4)), [])["y"].numpy() == 8
    assert instance.run(tensors(x=floats(4), scale=floats(5)), [])["y"].numpy() == 20


def test_lists_of_strings_are_string_tensors(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.Shout())
    text = (
        "max_batch_size: 4 "
        + entry("input", "words", "[1]", "TYPE_STRING")
        + entry("output", "loud", "[1]", "TYPE_STRING")
    )
    words = np.array([["grün"], ["b"]], dtype=object)
    result = instance_of(tmp_path, text).run({"words": Tensor.from_numpy("words", words)}, [])["loud"]
    assert [element.decode() for element in result.numpy().reshape(-1)] == ["GRüN", "B"]
    assert result.shape == (2, 1)


def test_fields_of_a_named_tuple_are_outputs_by_name(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.NamedTupleResult())
    text = entry("input", "x") + entry("output", "hidden") + entry("output", "logits")
    results = instance_of(tmp_path, text).run(tensors(x=floats(3)[0]), [])
    assert {name: tensor.numpy().item() for name, tensor in results.items()} == {"hidden": 4, "logits": 6}


def test_more_inputs_than_arguments_is_an_error_that_lists_them(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.SumAndDifference())
    text = "".join(entry("input", name) for name in "abc") + SUM_OUTPUTS
    with pytest.raises(InvalidArgument, match=r"a, b, c don't fit .*model\.pt, which takes 2 arguments: left, right"):
        instance_of(tmp_path, text)


# --- torch.export --------------------------------------------------------------------------------------


def test_exported_program_needs_no_config(tmp_path: Path) -> None:
    program = torch_models.exported(torch_models.NamedResults(), torch.ones(2, 4), Mask=torch.ones(2, 4))
    torch_models.save_export(tmp_path / "1" / "model.pt2", program)
    context = context_of(tmp_path)
    assert [tensor.name for tensor in context.config.input] == ["x", "Mask"]
    assert [tensor.name for tensor in context.config.output] == ["logits", "hidden"]
    assert context.config.max_batch_size == 4
    instance = instance_of(tmp_path)
    results = instance.run(tensors(x=floats(1, 2, 3, 4), Mask=floats(1, 0, 1, 0)), [])
    assert results["logits"].numpy().tolist() == [[1, 0, 3, 0]]
    assert results["hidden"].numpy().tolist() == [[2, 3, 4, 5]]


def test_shape_that_the_program_was_not_exported_for_is_the_clients_error(tmp_path: Path) -> None:
    program = torch_models.exported(torch_models.Identity(), torch.ones(2, 4))
    torch_models.save_export(tmp_path / "1" / "model.pt2", program)
    with pytest.raises(InvalidArgument, match="Guard failed"):
        instance_of(tmp_path).run(tensors(INPUT=floats(1, 2, 3)), [])


def test_outputs_of_a_free_size_of_their_own_keep_a_model_from_batching(tmp_path: Path) -> None:
    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten()

    torch_models.save_export(tmp_path / "1" / "model.pt2", torch_models.exported(Flat(), torch.ones(2, 4)))
    assert context_of(tmp_path).config.max_batch_size == 0


# --- a class and its weights ---------------------------------------------------------------------------


def save_torch(state: Any, path: Path) -> None:
    torch.save(state, path)


@pytest.mark.parametrize(("save", "filename"), [(save_torch, "model.pt"), (save_file, "model.safetensors")])
def test_class_in_model_py_gets_the_weights_beside_it(tmp_path: Path, save: Any, filename: str) -> None:
    linear = torch_models.save_class(tmp_path / "1", save, filename)
    text = "max_batch_size: 4 " + entry("input", "x") + entry("output", "y", "[2]")
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    result = instance_of(tmp_path, text).run(tensors(x=x.numpy()), [])["y"].numpy()
    torch.testing.assert_close(torch.tensor(result), torch.relu(linear(x)).detach())


@pytest.mark.parametrize("filename", ["model.pt", "model.safetensors"])
def test_class_is_found_when_the_config_names_only_the_weights(tmp_path: Path, filename: str) -> None:
    save = save_file if filename.endswith("safetensors") else save_torch
    torch_models.save_class(tmp_path / "1", save, filename)
    text = 'default_model_filename: "model.pt" ' + entry("input", "x") + entry("output", "y", "[2]")
    assert instance_of(tmp_path, text).run(tensors(x=floats(1, 2, 3, 4)), [])["y"].shape == (1, 2)


def test_several_classes_must_be_told_apart(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    source = "import torch\n" + "".join(
        f"class {name}(torch.nn.Module):\n    def forward(self, x):\n        return x {change}\n"
        for name, change in (("First", "+ 1"), ("Second", "+ 2"))
    )
    (tmp_path / "1" / "model.py").write_text(source)
    text = entry("input", "x") + entry("output", "y")
    with pytest.raises(InvalidArgument, match=r"several torch\.nn\.Modules: First, Second; name the model's"):
        instance_of(tmp_path, text)
    named = text + parameter("MODEL_CLASS_NAME", "Second")
    assert instance_of(tmp_path, named).run(tensors(x=floats(1)), [])["y"].numpy() == 3


def test_class_is_compiled_where_the_config_says_how(tmp_path: Path) -> None:
    torch_models.save_class(tmp_path / "1", save_torch, "model.pt")
    text = entry("input", "x") + entry("output", "y", "[2]")
    options = '{\\"backend\\": \\"eager\\", \\"dynamic\\": true}'
    plain, compiled = (
        instance_of(tmp_path, text),
        instance_of(tmp_path, text + parameter("TORCH_COMPILE_OPTIONAL_PARAMETERS", options)),
    )
    inputs = tensors(x=floats(1, 2, 3, 4))
    assert compiled.run(inputs, [])["y"].numpy().tolist() == plain.run(inputs, [])["y"].numpy().tolist()
    with pytest.raises(InvalidArgument, match="JSON object"):
        instance_of(tmp_path, text + parameter("TORCH_COMPILE_OPTIONAL_PARAMETERS", "[]"))


# --- files that are no models --------------------------------------------------------------------------

SIMPLE = entry("input", "x") + entry("output", "y")


def test_pickled_module_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    torch.save(torch.nn.Linear(1, 1), tmp_path / "1" / "model.pt")
    with pytest.raises(InvalidArgument, match=r"model\.pt is neither TorchScript nor beside a model\.py"):
        instance_of(tmp_path, SIMPLE)


def test_state_dict_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch_models.save_class(tmp_path / "1", save_torch, "model.pt")
    (tmp_path / "1" / "model.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(InvalidArgument, match=r"model\.pt"):
        instance_of(tmp_path, entry("input", "x") + entry("output", "y", "[2]"))


def test_weights_for_another_class_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    torch_models.save_class(tmp_path / "1", save_torch, "model.pt")
    torch.save({"other": torch.ones(1)}, tmp_path / "1" / "model.pt")
    with pytest.raises(InvalidArgument, match=r"can't load .*model\.py: Error\(s\) in loading state_dict"):
        instance_of(tmp_path, SIMPLE)


def test_missing_artifact_names_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    with pytest.raises(NotFound, match=r"unable to find .*model\.py or .*model\.pt or .*model\.pt2; .* is empty"):
        instance_of(tmp_path, SIMPLE)


# --- running -------------------------------------------------------------------------------------------


def test_model_that_writes_into_its_input_writes_into_a_copy(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.WritesItsInput())
    array = floats(1, 2, 3, 4)
    text = "max_batch_size: 1 " + entry("input", "INPUT") + entry("output", "OUTPUT")
    result = instance_of(tmp_path, text).run(tensors(INPUT=array), [])["OUTPUT"].numpy()
    assert (result.tolist(), array.tolist()) == ([[2, 3, 4, 5]], [[1, 2, 3, 4]])


def test_wrong_data_type_of_an_output_is_the_models_error(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.Identity())
    text = entry("input", "INPUT") + entry("output", "OUTPUT", datatype="TYPE_FP64")
    with pytest.raises(Internal, match=r"specified datatype TYPE_FP64 for output 'OUTPUT' .* returned TYPE_FP32"):
        instance_of(tmp_path, text).run(tensors(INPUT=floats(1)), [])


def test_output_that_the_model_does_not_return_is_an_error(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.Identity())
    text = entry("input", "INPUT") + entry("output", "OUTPUT__3")
    with pytest.raises(InvalidArgument, match="returned 1 tensors"):
        instance_of(tmp_path, text).run(tensors(INPUT=floats(1)), [])


@pytest.mark.parametrize(
    "setting",
    ["INFERENCE_MODE", "DISABLE_OPTIMIZED_EXECUTION", "ENABLE_WEIGHT_SHARING", "ENABLE_JIT_PROFILING", "DISABLE_CUDNN"],
)
@pytest.mark.parametrize("value", ["true", "false"])
def test_tritons_switches_are_taken_and_change_no_result(tmp_path: Path, setting: str, value: str) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.Identity())
    text = entry("input", "INPUT") + entry("output", "OUTPUT") + parameter(setting, value)
    assert instance_of(tmp_path, text).run(tensors(INPUT=floats(7)), [])["OUTPUT"].numpy() == 7


def test_shared_weights_are_loaded_once(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.Identity())
    text = entry("input", "INPUT") + entry("output", "OUTPUT")
    for sharing, num_programs in (("true", 1), ("false", 2)):
        model = BACKEND.load(context_of(tmp_path, text + parameter("ENABLE_WEIGHT_SHARING", sharing)))
        instances = [model.create_instance(Placement(f"m_{number}")) for number in range(2)]
        assert len({id(instance._program) for instance in instances}) == num_programs  # type: ignore[attr-defined]


def test_models_live_in_a_process_or_with_their_gpu() -> None:
    assert BACKEND.host_kind(config_of()) is HostKind.PROCESS
    assert BACKEND.host_kind(config_of("instance_group { kind: KIND_GPU }")) is HostKind.DEVICE


def test_ranges_of_tensors_on_a_device_are_joined_there() -> None:
    first, second = (TorchDeviceData(torch.arange(6, dtype=torch.float32) + start) for start in (0, 10))
    joined = first.part(8, 8).joined([first.part(8, 8), second.part(4, 12).part(4, 8)])
    assert isinstance(joined, TorchDeviceData)
    assert np.frombuffer(joined.to_host(), np.float32).tolist() == [2, 3, 12, 13]
    assert first.joined([first, memoryview(b"1234")]) is None


def test_a_kept_output_is_not_changed_by_a_model_that_answers_with_its_own_memory(tmp_path: Path) -> None:
    torch_models.save_script(tmp_path / "1" / "model.pt", torch_models.Counting())
    instance = instance_of(tmp_path, "max_batch_size: 1 " + entry("input", "INPUT") + entry("output", "OUTPUT"))
    instance.kept_outputs = frozenset(["OUTPUT"])
    first, second = (instance.run(tensors(INPUT=floats(1, 2, 3, 4)), [])["OUTPUT"] for _ in range(2))
    assert first.numpy().tolist() == [[1, 2, 3, 4]]
    assert second.numpy().tolist() == [[2, 4, 6, 8]]
