"""The TensorRT backend without a GPU: its decisions, its calls against the recorded signatures, its errors.

What only hardware can show (memory, streams, real plans) is in tests/gpu.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from enginehouse.backend import HostKind, LoadContext
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError, InvalidArgument, NotFound, Unavailable, Unsupported
from enginehouse.types import DataType, DeviceData, Tensor
from enginehouse_backends.tensorrt_engine import TensorRTBackend, check_against, complete_from, load_plugins
from enginehouse_backends.tensorrt_engine.engine import Engine
from enginehouse_backends.tensorrt_engine.instance import TensorRTInstance, new_output_allocator
from enginehouse_backends.tensorrt_engine.profiles import (
    GraphShape,
    Range,
    choose_profile,
    profile_numbers,
    smallest_holding,
)

from .fake_tensorrt import HostMemory, make_library, plan, tensor
from .tensorrt_signatures import recorded

VERSIONS = sorted(recorded())
FREE = {"x": [[1, 2], [2, 4], [4, 8]]}
ADD_ONE = plan([tensor("x", [-1, -1]), tensor("y", [-1, -1], output=True)], [FREE], "add_one")


@pytest.fixture(params=VERSIONS)
def library(request: pytest.FixtureRequest) -> Any:
    return make_library(request.param)


def config_of(text: str = "") -> ModelConfig:
    return text_format.Parse(f'name: "m" {text}', ModelConfig())


def engine_of(library: Any, folder: Path, content: bytes) -> Engine:
    path = folder / "model.plan"
    path.write_bytes(content)
    return Engine(library, path, runs_host_code=True)


def instance_of(
    library: Any, folder: Path, content: bytes, text: str = "", profiles: tuple[int, ...] = (0,)
) -> tuple[TensorRTInstance, HostMemory]:
    engine, memory = engine_of(library, folder, content), HostMemory()
    return TensorRTInstance(config_of(text), engine, memory, profiles), memory


def run(instance: TensorRTInstance, **arrays: Any) -> Any:
    inputs = {name: Tensor.from_numpy(name, np.asarray(array)) for name, array in arrays.items()}
    return next(iter(instance.run(inputs, []).values())).numpy()


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


# --- running -------------------------------------------------------------------------------------------


def test_batches_of_different_shapes_run_one_after_the_other(library: Any, tmp_path: Path) -> None:
    instance, _ = instance_of(library, tmp_path, ADD_ONE)
    for rows, columns in ((1, 2), (4, 8), (2, 3)):
        array = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
        assert (run(instance, x=array) == array + 1).all()
    instance.close()


def test_shape_outside_of_all_profiles_is_an_error_that_lists_them(library: Any, tmp_path: Path) -> None:
    instance, _ = instance_of(library, tmp_path, ADD_ONE)
    with pytest.raises(InvalidArgument, match=r"holds 'x' \[5, 4\]\. Allowed: profile 0: 'x' \[1, 2\] to \[4, 8\]"):
        run(instance, x=ones(5, 4))


def test_output_whose_size_only_running_tells_comes_through_an_allocator(library: Any, tmp_path: Path) -> None:
    content = plan([tensor("x", [-1, -1]), tensor("y", [-1], output=True)], [FREE], "positive")
    instance, _ = instance_of(library, tmp_path, content)
    for array in ([[1, -1, 2]], [[-1, -1]], [[5, 6, 7, 8]]):
        assert run(instance, x=np.array(array, np.float32)).tolist() == [value for value in array[0] if value > 0]


def test_a_kept_output_is_the_next_plans_input_on_the_device_and_outlives_the_next_batch(
    library: Any, tmp_path: Path
) -> None:
    first, _ = instance_of(library, tmp_path, ADD_ONE)
    first.kept_outputs = frozenset(["y"])
    kept = first.run({"x": Tensor.from_numpy("x", ones(4, 3))}, [])["y"]
    assert isinstance(kept.data, DeviceData)
    run(first, x=ones(4, 8) * 7)  # writes into the same buffers
    for text in ("", "max_batch_size: 4 optimization { cuda { graphs: true } }"):
        fixed = plan(
            [tensor("x", [-1, 3]), tensor("y", [-1, 3], output=True)], [{"x": [[1, 3], [2, 3], [4, 3]]}], "add_one"
        )
        second, memory = instance_of(library, tmp_path, fixed, text)
        found = second.run({"x": Tensor("x", kept.datatype, kept.shape, kept.data)}, [])["y"]
        assert found.numpy().tolist() == [[3] * 3] * 4
        assert bool(memory.num_replayed) is bool(text)


def shape_plan() -> bytes:
    tensors = [
        tensor("x", [-1, 1]),
        tensor("shape", [2], "INT32", on_host=True),
        tensor("y", [-1, -1], output=True),
    ]
    profile = {"x": [[1, 1], [2, 1], [4, 1]], "shape": [[1, 1], [2, 4], [4, 8]]}
    return plan(tensors, [profile], "reshaped")


def test_shape_tensor_is_read_on_the_host_with_the_batch_in_front(library: Any, tmp_path: Path) -> None:
    batched, _ = instance_of(library, tmp_path, shape_plan(), "max_batch_size: 4")
    assert run(batched, x=ones(3, 1), shape=np.array([5], np.int32)).shape == (3, 5)
    whole, _ = instance_of(library, tmp_path, shape_plan())
    assert run(whole, x=ones(3, 1), shape=np.array([3, 7], np.int32)).shape == (3, 7)


def test_values_of_a_shape_tensor_are_checked_against_the_profile(library: Any, tmp_path: Path) -> None:
    instance, _ = instance_of(library, tmp_path, shape_plan(), "max_batch_size: 4")
    with pytest.raises(InvalidArgument, match=r"'shape' \[3, 9\]"):
        run(instance, x=ones(3, 1), shape=np.array([9], np.int32))


def test_the_profile_built_for_the_nearest_shape_is_chosen(library: Any, tmp_path: Path) -> None:
    small, large = {"x": [[1, 2], [1, 2], [4, 8]]}, {"x": [[1, 2], [4, 8], [4, 8]]}
    content = plan([tensor("x", [-1, -1]), tensor("y", [-1, -1], output=True)], [small, large], "add_one")
    instance, _ = instance_of(library, tmp_path, content, profiles=(0, 1))
    ranges = instance._profiles
    assert choose_profile("m", ranges, {"x": (1, 3)}) == 0
    assert choose_profile("m", ranges, {"x": (4, 7)}) == 1
    assert (run(instance, x=ones(4, 8)) == 2).all()


def test_vectorized_formats_are_filled_up_to_whole_vectors(library: Any, tmp_path: Path) -> None:
    tensors = [
        tensor("x", [-1, 6], "INT8", vectorized_dim=1, num_components=4),
        tensor("y", [-1, 6], "INT8", output=True),
    ]
    engine = engine_of(library, tmp_path, plan(tensors, [{"x": [[1, 6], [1, 6], [2, 6]]}], "same"))
    assert engine.inputs[0].num_bytes((2, 6)) == 2 * 8
    assert engine.outputs[0].num_bytes((2, 6)) == 2 * 6


def test_file_that_is_no_plan_is_an_error_with_tensorrts_reason(library: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"can't load .*model\.plan: magic tag does not match"):
        engine_of(library, tmp_path, b"not a plan")


def test_type_that_the_protocol_lacks_is_refused_by_name(library: Any, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="tensor 'x' is FP8"):
        engine_of(library, tmp_path, plan([tensor("x", [1], "FP8")], [{}], "same"))


def test_wrong_inputs_are_the_clients_error(library: Any, tmp_path: Path) -> None:
    instance, _ = instance_of(library, tmp_path, ADD_ONE)
    with pytest.raises(InvalidArgument, match="has data-type FP64, but the model expects FP32"):
        run(instance, x=np.ones((1, 2)))
    with pytest.raises(InvalidArgument, match="'z' for model 'm', allowed outputs are: y"):
        instance.run({"x": Tensor.from_numpy("x", ones(1, 2))}, ["z"])


# --- CUDA graphs ---------------------------------------------------------------------------------------

GRAPHS = "max_batch_size: 4 dynamic_batching { preferred_batch_size: 2 } optimization { cuda { graphs: true } }"
FIXED_WIDTH = plan(
    [tensor("x", [-1, 3]), tensor("y", [-1, 3], output=True)], [{"x": [[1, 3], [2, 3], [4, 3]]}], "add_one"
)


def test_graphs_are_captured_for_one_preferred_and_most_rows_and_replayed(library: Any, tmp_path: Path) -> None:
    instance, memory = instance_of(library, tmp_path, FIXED_WIDTH, GRAPHS)
    assert memory.num_captured == 3
    for rows, num_replayed in ((1, 1), (2, 2), (3, 2), (4, 3)):
        array = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
        assert (run(instance, x=array) == array + 1).all()
        assert memory.num_replayed == num_replayed, "three rows have no graph and run without"


def test_graph_with_a_lower_bound_serves_smaller_batches(library: Any, tmp_path: Path) -> None:
    spec = "graph_spec { batch_size: 4 graph_lower_bound { batch_size: 2 } }"
    text = f"max_batch_size: 4 optimization {{ cuda {{ graphs: true {spec} }} }}"
    instance, memory = instance_of(library, tmp_path, FIXED_WIDTH, text)
    array = np.arange(9, dtype=np.float32).reshape(3, 3)
    result = run(instance, x=array)
    assert (result.shape, (result == array + 1).all(), memory.num_replayed) == ((3, 3), True, 1)
    run(instance, x=ones(1, 3))
    assert memory.num_replayed == 1


def test_graphs_of_free_widths_need_a_spec(library: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="graphs needs graph_spec, because more than the batch varies"):
        instance_of(library, tmp_path, ADD_ONE, GRAPHS)
    spec = 'graph_spec { batch_size: 2 input { key: "x" value { dim: [5] } } }'
    instance, memory = instance_of(
        library, tmp_path, ADD_ONE, f"max_batch_size: 4 optimization {{ cuda {{ graphs: true {spec} }} }}"
    )
    assert (run(instance, x=ones(2, 5)) == 2).all()
    assert memory.num_replayed == 1


def test_smallest_graph_that_holds_a_batch_is_used() -> None:
    graphs = [GraphShape({"x": (rows, 3)}, least) for rows, least in ((8, 1), (4, 2), (2, 2))]
    assert [smallest_holding(graphs, {"x": (rows, 3)}) for rows in (1, 2, 3, 4, 5, 9)] == [0, 2, 1, 1, 0, None]
    assert smallest_holding(graphs, {"x": (2, 4)}) is None


# --- profiles ------------------------------------------------------------------------------------------


def test_instance_groups_profiles_are_numbers_that_the_plan_has() -> None:
    assert profile_numbers("m", [], 3) == [0, 1, 2]
    assert profile_numbers("m", ["2", "0"], 3) == [2, 0]
    for wrong in ("3", "best"):
        with pytest.raises(InvalidArgument, match=f"names profile '{wrong}', the plan has 0 to 2"):
            profile_numbers("m", [wrong], 3)


def test_range_holds_only_shapes_of_its_rank() -> None:
    held = Range((1, 2), (1, 4), (2, 8))
    assert held.holds((2, 2))
    assert not held.holds((2,))
    assert not held.holds((3, 2))


# --- the backend on a machine without a GPU ------------------------------------------------------------


@pytest.fixture
def backend(library: Any, monkeypatch: pytest.MonkeyPatch) -> TensorRTBackend:
    """With the fake in TensorRT's place."""
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    return TensorRTBackend()


def context_of(folder: Path, text: str = "", **options: str) -> LoadContext:
    return LoadContext(config_of(text), 1, folder, backend_options=options)


def test_machine_without_a_gpu_gets_a_clear_error_and_no_crash(backend: TensorRTBackend, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    with pytest.raises(NotFound, match=r"unable to find .*model\.plan"):
        backend.load(context_of(tmp_path))
    (tmp_path / "1" / "model.plan").write_bytes(ADD_ONE)
    for call in (backend.load, backend.complete_config):
        with pytest.raises(Unsupported, match="model 'm' needs TensorRT, and TensorRT needs an NVIDIA GPU"):
            call(context_of(tmp_path))
    assert backend.memory_needs(context_of(tmp_path)).weights_bytes == len(ADD_ONE)
    assert backend.host_kind(config_of()) is HostKind.DEVICE


def test_machine_without_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_lean"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unavailable, match=r"pip install 'enginehouse\[tensorrt\]'"):
        TensorRTBackend()


def test_config_is_completed_from_the_plan(library: Any, tmp_path: Path) -> None:
    completed = complete_from(engine_of(library, tmp_path, ADD_ONE), config_of())
    assert completed == config_of(
        """max_batch_size: 4 dynamic_batching { } input { name: "x" data_type: TYPE_FP32 dims: [-1] }
        output { name: "y" data_type: TYPE_FP32 dims: [-1] }"""
    )
    shaped = complete_from(engine_of(library, tmp_path, shape_plan()), config_of())
    (entry,) = [entry for entry in shaped.input if entry.name == "shape"]
    assert (entry.is_shape_tensor, list(entry.dims), entry.data_type) == (True, [2], DataType.INT32.proto)
    check_against(engine_of(library, tmp_path, shape_plan()), shaped)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: 9", "max_batch_size is 9, the profiles of .* allow 4"),
        ('input { name: "x" data_type: TYPE_FP16 dims: [-1] }', "datatype TYPE_FP16 for input 'x'"),
        ('input { name: "X" }', "'X' in the config of model 'm'"),
    ],
)
def test_config_that_contradicts_the_plan_is_refused(library: Any, tmp_path: Path, text: str, message: str) -> None:
    engine = engine_of(library, tmp_path, ADD_ONE)
    with pytest.raises(EnginehouseError, match=message):
        check_against(engine, complete_from(engine, config_of(text)))


def test_plugin_library_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"tensorrt,plugins: can't load nowhere\.so"):
        load_plugins(context_of(tmp_path, plugins="nowhere.so"))


# --- what we give to TensorRT --------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_our_output_allocator_takes_what_tensorrt_passes(version: str) -> None:
    allocator = new_output_allocator(make_library(version), HostMemory())
    for name, arguments in recorded()[version]["overridden"]["IOutputAllocator"].items():
        if name in ("__init__", "reallocate_output"):  # the second is the older form of reallocate_output_async
            continue
        assert len(inspect.signature(getattr(allocator, name)).parameters) == len(arguments)
