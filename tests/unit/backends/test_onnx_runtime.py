"""The ONNX Runtime backend against the plug-in contract; what all backends share is in tests/conformance."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper

from enginehouse.backend import HostKind, LoadContext, Placement, TensorInstance
from enginehouse.config.schema import ModelConfig
from enginehouse.errors import EnginehouseError, InvalidArgument, NotFound, Unsupported
from enginehouse.types import DataType, Tensor
from enginehouse_backends.onnx_runtime import BoundOnnxInstance, OnnxModel, OnnxRuntimeBackend
from enginehouse_backends.onnx_runtime.session_settings import providers, session_options
from enginehouse_backends.parameters import default_threads

from . import onnx_models

BACKEND = OnnxRuntimeBackend()
GPU_BUILD = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def config_of(text: str = "") -> ModelConfig:
    return text_format.Parse(f'name: "m" {text}', ModelConfig())


def context_of(folder: Path, text: str = "") -> LoadContext:
    context = LoadContext(config_of(text), 1, folder)
    return LoadContext(BACKEND.complete_config(context), 1, folder)


def instance_of(folder: Path, text: str = "") -> TensorInstance:
    model = BACKEND.load(context_of(folder, text))
    assert isinstance(model, OnnxModel)
    return model.create_instance(Placement("m_0"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx_models.identity(tmp_path / "1" / "model.onnx")
    return tmp_path


def ones(rows: int = 2) -> dict[str, Tensor]:
    return {"INPUT": Tensor.from_numpy("INPUT", np.ones((rows, 4), np.float32))}


def test_outputs_are_views_of_the_runtimes_memory(folder: Path) -> None:
    (output,) = instance_of(folder).run(ones(), []).values()
    assert isinstance(output.data, memoryview)
    array = np.frombuffer(output.data, np.float32)
    assert array.base is not None
    assert not array.flags.owndata


def test_instances_of_one_device_share_a_session_and_run_side_by_side(folder: Path) -> None:
    model = BACKEND.load(context_of(folder))
    instances = [model.create_instance(Placement(f"m_{number}")) for number in range(3)]
    results: list[Tensor] = []

    def run(instance: TensorInstance) -> None:
        for _ in range(20):
            results.extend(instance.run(ones(3), []).values())

    threads = [threading.Thread(target=run, args=(instance,)) for instance in instances]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60
    assert all((result.numpy() == 1).all() for result in results)
    assert len({id(instance._session) for instance in instances}) == 1  # type: ignore[attr-defined]


def test_input_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    onnx_models.scaled(tmp_path / "1" / "model.onnx", default_scale=3.0)
    text = 'max_batch_size: 4 input { name: "INPUT" } input { name: "SCALE" optional: true dims: [1] reshape { } }'
    instance = instance_of(tmp_path)
    assert (instance.run(ones(), [])["OUTPUT"].numpy() == 3).all()
    scale = {"SCALE": Tensor.from_numpy("SCALE", np.array([5], np.float32))}
    assert (instance.run({**ones(), **scale}, [])["OUTPUT"].numpy() == 5).all()
    with pytest.raises(InvalidArgument, match=r"shape \[-1\] for input 'SCALE'"):
        instance_of(tmp_path, text)


def test_only_the_outputs_asked_for_are_computed(tmp_path: Path) -> None:
    onnx_models.save(
        tmp_path / "1" / "model.onnx",
        [helper.make_node("Identity", ["INPUT"], ["SAME"]), helper.make_node("Neg", ["INPUT"], ["NEGATED"])],
        [onnx_models.value("INPUT", TensorProto.FLOAT, ["n", 4])],
        [onnx_models.value(name, TensorProto.FLOAT, ["n", 4]) for name in ("SAME", "NEGATED")],
    )
    instance = instance_of(tmp_path)
    assert list(instance.run(ones(), ["NEGATED"])) == ["NEGATED"]
    assert list(instance.run(ones(), [])) == ["SAME", "NEGATED"]
    with pytest.raises(InvalidArgument, match="'OTHER' for model 'm', allowed outputs are: SAME, NEGATED"):
        instance.run(ones(), ["OTHER"])


def test_output_without_a_shape_in_the_file_is_inferred(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["INPUT"], ["OUTPUT"])]
    inputs = [onnx_models.value("INPUT", TensorProto.FLOAT, ["batch", 4])]
    outputs = [onnx_models.value("OUTPUT", TensorProto.FLOAT, None)]
    onnx_models.save(tmp_path / "1" / "model.onnx", nodes, inputs, outputs)
    assert list(context_of(tmp_path).config.output[0].dims) == [4]


def test_output_whose_rows_are_not_the_requests_keeps_a_model_from_batching(tmp_path: Path) -> None:
    nodes = [helper.make_node("Transpose", ["INPUT"], ["OUTPUT"], perm=[1, 0])]
    inputs = [onnx_models.value("INPUT", TensorProto.FLOAT, ["batch", "boxes"])]
    outputs = [onnx_models.value("OUTPUT", TensorProto.FLOAT, ["boxes", "batch"])]
    onnx_models.save(tmp_path / "1" / "model.onnx", nodes, inputs, outputs)
    assert context_of(tmp_path).config.max_batch_size == 0


def test_weights_beside_the_file_count_and_are_missed_by_name(tmp_path: Path) -> None:
    path = onnx_models.scaled(tmp_path / "1" / "model.onnx")
    onnx.save_model(onnx.load(path), str(path), save_as_external_data=True, location="big.bin", size_threshold=0)
    context = context_of(tmp_path)
    num_bytes = path.stat().st_size + (tmp_path / "1" / "big.bin").stat().st_size
    assert BACKEND.memory_needs(context).weights_bytes == num_bytes
    (tmp_path / "1" / "big.bin").unlink()
    with pytest.raises(NotFound, match=r"keeps weights in .*big\.bin, which is not there"):
        BACKEND.load(context)


def test_model_in_a_folder_of_the_artifacts_name_loads(tmp_path: Path) -> None:
    onnx_models.identity(tmp_path / "1" / "model.onnx" / "model.onnx")
    assert list(instance_of(tmp_path).run(ones(), [])) == ["OUTPUT"]


def test_graph_that_the_runtime_refuses_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    nodes = [helper.make_node("NoSuchOperator", ["INPUT"], ["OUTPUT"])]
    tensors = [[onnx_models.value(name, TensorProto.FLOAT, ["n", 4])] for name in ("INPUT", "OUTPUT")]
    onnx_models.save(tmp_path / "1" / "model.onnx", nodes, *tensors)
    with pytest.raises(InvalidArgument, match=r"1/model\.onnx: .*NoSuchOperator"):
        instance_of(tmp_path)


def test_string_that_is_not_utf8_is_refused_by_its_place(tmp_path: Path) -> None:
    onnx_models.identity(tmp_path / "1" / "model.onnx", TensorProto.STRING)
    words = np.array([[b"a", b"b", b"\xff", b"d"]], dtype=object)
    with pytest.raises(InvalidArgument, match="element 2 of input 'INPUT' is not UTF-8"):
        instance_of(tmp_path).run({"INPUT": Tensor.from_numpy("INPUT", words)}, [])


@pytest.mark.parametrize("element_type", [TensorProto.FLOAT, TensorProto.INT8, TensorProto.BOOL])
def test_binding_gives_what_a_plain_run_gives(tmp_path: Path, element_type: int) -> None:
    onnx_models.identity(tmp_path / "1" / "model.onnx", element_type)
    model = BACKEND.load(context_of(tmp_path))
    assert isinstance(model, OnnxModel)
    plain = model.create_instance(Placement("m_0"))
    bound = BoundOnnxInstance(model, model._session_by_device["cpu"], "cpu")
    values = np.array([[1, 0, 3, 4]])
    inputs = {"INPUT": Tensor.from_numpy("INPUT", values, model.signature.inputs[0].datatype)}
    assert bound.run(inputs, [])["OUTPUT"].numpy().tolist() == plain.run(inputs, [])["OUTPUT"].numpy().tolist()


def test_bound_output_outlives_the_next_run(tmp_path: Path) -> None:
    onnx_models.identity(tmp_path / "1" / "model.onnx", TensorProto.BFLOAT16)
    instance = instance_of(tmp_path)
    assert isinstance(instance, BoundOnnxInstance)

    def run(bits: int) -> Tensor:
        array = np.full((1, 4), bits, np.uint16)
        return instance.run({"INPUT": Tensor.from_numpy("INPUT", array, DataType.BF16)}, [])["OUTPUT"]

    first, second = run(7), run(9)
    assert (first.numpy() == 7).all()
    assert (second.numpy() == 9).all()


# --- options -------------------------------------------------------------------------------------------


def parameters(**values: str) -> str:
    return " ".join(
        f'parameters {{ key: "{key.replace("__", ".")}" value {{ string_value: "{value}" }} }}'
        for key, value in values.items()
    )


def options_of(text: str = "", **backend_options: str) -> onnxruntime.SessionOptions:
    return session_options(LoadContext(config_of(text), 1, Path(), backend_options=backend_options))


def test_defaults_do_not_spin_and_keep_no_arena() -> None:
    options = options_of()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.enable_cpu_mem_arena is False
    assert options.intra_op_num_threads >= 1


def test_parameters_reach_the_session() -> None:
    text = parameters(
        intra_op_thread_count="3", inter_op_thread_count="2", execution_mode="1", enable_mem_arena="1",
        enable_mem_pattern="0", session__intra_op__allow_spinning="1",
    )  # fmt: skip
    options = options_of(text + "optimization { graph { level: -1 } }")
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL
    assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (True, False)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC


def test_shrinking_an_arena_needs_one_and_runs(folder: Path) -> None:
    text = parameters(memory__enable_memory_arena_shrinkage="cpu:0")
    assert options_of(text).enable_cpu_mem_arena is True
    assert (instance_of(folder, text).run(ones(), [])["OUTPUT"].numpy() == 1).all()


def test_cpus_are_divided_among_the_instances() -> None:
    alone, many = config_of(), config_of("instance_group { count: 1000 kind: KIND_CPU }")
    assert default_threads(alone) >= default_threads(many) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (parameters(intra_op_thread_count="two"), "'intra_op_thread_count' is 'two', it must be a whole number"),
        (parameters(execution_mode="7"), "'execution_mode' is '7', it must be one of 0, 1"),
        (parameters(enable_mem_arena="maybe"), "'enable_mem_arena' is 'maybe', it must be 1, 0, true or false"),
        ("optimization { graph { level: 9 } }", "optimization.graph.level is 9, it must be -1"),
    ],
)
def test_wrong_parameter_is_an_error_that_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        options_of(text)


def test_missing_operator_library_is_named() -> None:
    with pytest.raises(NotFound, match=r"op_library_filename 'ops\.so'"):
        options_of('model_operations { op_library_filename: "ops.so" }')


ACCELERATOR = "optimization {{ execution_accelerators {{ {kind}_execution_accelerator {{ {body} }} }} }}"


def gpu(body: str) -> str:
    return ACCELERATOR.format(kind="gpu", body=body)


def test_gpu_instances_get_tensorrt_then_cuda_then_the_cpu() -> None:
    text = gpu(
        'name: "tensorrt" parameters { key: "precision_mode" value: "FP16" } '
        'parameters { key: "max_workspace_size_bytes" value: "7" } '
        'parameters { key: "trt_engine_cache_enable" value: "1" }'
    )
    tensorrt = {
        "device_id": "1", "trt_fp16_enable": "1", "trt_max_workspace_size": "7", "trt_engine_cache_enable": "1",
    }  # fmt: skip
    assert providers(config_of(text), "cuda:1", GPU_BUILD) == [
        ("TensorrtExecutionProvider", tensorrt),
        ("CUDAExecutionProvider", {"device_id": "1"}),
        ("CPUExecutionProvider", {}),
    ]


def test_cuda_options_come_from_parameters_and_from_the_accelerator() -> None:
    text = parameters(cudnn_conv_algo_search="1", arena_extend_strategy="1", gpu_mem_limit="1000")
    text += gpu('name: "cuda" parameters { key: "use_ep_level_unified_stream" value: "1" }')
    assert providers(config_of(text), "cuda:0", GPU_BUILD)[0][1] == {
        "device_id": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": "1000", "use_ep_level_unified_stream": "1",
    }  # fmt: skip


def test_gpu_accelerators_mean_nothing_to_cpu_instances() -> None:
    assert providers(config_of(gpu('name: "tensorrt"')), "cpu", GPU_BUILD) == [("CPUExecutionProvider", {})]


@pytest.mark.parametrize(
    ("text", "device", "error", "message"),
    [
        ("", "cuda:0", Unsupported, r"needs onnxruntime's CUDAExecutionProvider on cuda:0; .*enginehouse\[gpu\]"),
        (ACCELERATOR.format(kind="cpu", body='name: "openvino"'), "cpu", Unsupported, "OpenVINOExecutionProvider"),
        (ACCELERATOR.format(kind="cpu", body='name: "magic"'), "cpu", InvalidArgument, "accelerator 'magic'"),
        (
            gpu('name: "tensorrt" parameters { key: "precision_mode" value: "FP7" }'),
            "cuda:0", InvalidArgument, "precision mode 'FP7', it must be FP32, FP16 or INT8",
        ),
        (
            gpu('name: "tensorrt" parameters { key: "wrong" value: "1" }'),
            "cuda:0", InvalidArgument, "unknown parameter 'wrong' is provided for TensorRT Execution Accelerator",
        ),
    ],
)  # fmt: skip
def test_provider_that_cannot_be_had_is_an_error(
    text: str, device: str, error: type[EnginehouseError], message: str
) -> None:
    with pytest.raises(error, match=message):
        providers(config_of(text), device, ["CPUExecutionProvider"])


def test_gpu_models_live_in_the_device_process() -> None:
    assert BACKEND.host_kind(config_of()) is HostKind.THREAD
    assert BACKEND.host_kind(config_of("instance_group { kind: KIND_GPU }")) is HostKind.DEVICE
