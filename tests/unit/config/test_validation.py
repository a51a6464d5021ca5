"""Each rule of a config, with the text that Triton's clients know."""

from __future__ import annotations

import pytest

from enginehouse.config.backends import PLATFORMS
from enginehouse.config.validation import check_structure, check_tensors

from .config_factories import from_text

IO = (
    'max_batch_size: 4 input { name: "X" data_type: TYPE_FP32 dims: [ 2 ] } '
    'output { name: "Y" data_type: TYPE_FP32 dims: [ 2 ] } '
)


def problems(text: str, head: str = IO) -> list[tuple[str, str]]:
    config = from_text(head + text)
    return [(found.field, found.text) for found in (*check_structure(config, "m"), *check_tensors(config))]


def test_a_good_config_has_no_problem() -> None:
    assert problems("dynamic_batching { }") == []


CONTROL = 'sequence_batching { control_input { name: "S" control { kind: CONTROL_SEQUENCE_'


@pytest.mark.parametrize(
    ("text", "field", "expected"),
    [
        ('name: "other"', "name", "unexpected directory name 'm' for model 'other', directory name must equal "
         "model name"),
        ('platform: "onnxruntime_onx"', "platform",
         "unexpected platform type 'onnxruntime_onx' for m; did you mean 'onnxruntime_onnx'?; "
         f"allowed: {', '.join(PLATFORMS)}"),
        ('backend: "pytorch" platform: "onnxruntime_onnx"', "platform",
         "unexpected 'platform' and 'backend' pair, got:onnxruntime_onnx, pytorch"),
        ('backend: "python" platform: "ensemble"', "backend",
         "Ensemble model 'm' must have platform type 'ensemble' and empty backend type"),
        ("dynamic_batching { preferred_batch_size: [ 2, 0 ] }", "dynamic_batching.preferred_batch_size[1]",
         "dynamic batching preferred size must be positive for m"),
        ("dynamic_batching { preferred_batch_size: 5 }", "dynamic_batching.preferred_batch_size[0]",
         "dynamic batching preferred size must be <= max batch size for m"),
        ("dynamic_batching { priority_levels: 2 }", "dynamic_batching.default_priority_level",
         "default priority level must be in range [1, 2] for m"),
        ("dynamic_batching { priority_levels: 1 default_priority_level: 1 priority_queue_policy { key: 2 } }",
         'dynamic_batching.priority_queue_policy["2"]',
         "priority queue policy must have priority level in range [1, 1] for m"),
        ("dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }",
         "dynamic_batching.priority_levels",
         "Only one priority level is allowed when 'preserve_ordering' is true for m"),
        ("dynamic_batching { preserve_ordering: true default_queue_policy { timeout_action: DELAY "
         "default_timeout_microseconds: 5 } }", "dynamic_batching.default_queue_policy",
         "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for m"),
        ("response_cache { enable: true } sequence_batching { }", "response_cache",
         "Response Cache does not currently support model m with sequence batching scheduler. Please disable "
         "the response cache."),
        (CONTROL + "END int32_false_true: [ 0 ] } } }",
         "sequence_batching.control_input[0].control[0].int32_false_true",
         "sequence batching control 'int32_false_true' must have exactly 2 entries for CONTROL_SEQUENCE_END "
         "for m"),
        (CONTROL + "READY int32_false_true: [ 0, 1 ] bool_false_true: [ false, true ] } } }",
         "sequence_batching.control_input[0].control[0]",
         "sequence batching specifies more than one from 'int32_false_true', 'fp32_false_true' and "
         "'bool_false_true' for CONTROL_SEQUENCE_READY for m"),
        (CONTROL + "CORRID data_type: TYPE_FP32 } } }", "sequence_batching.control_input[0].control[0].data_type",
         "unexpected data type for control CONTROL_SEQUENCE_CORRID for m. Allowed data types are TYPE_UINT64, "
         "TYPE_INT64, TYPE_UINT32, TYPE_INT32 and TYPE_STRING"),
        (CONTROL + "CORRID data_type: TYPE_UINT64 int32_false_true: [ 0, 1 ] } } }",
         "sequence_batching.control_input[0].control[0]",
         "sequence batching must not specify either 'int32_false_true', 'fp32_false_true' or "
         "'bool_false_true' for CONTROL_SEQUENCE_CORRID for m"),
        ("sequence_batching { control_input { } }", "sequence_batching.control_input[0]",
         "sequence batching control tensor must have a name for m"),
        ('sequence_batching { control_input { name: "S" } control_input { name: "S" } }',
         "sequence_batching.control_input[1]",
         "sequence batching control tensor 'S' is specified for multiple control kinds for m"),
        ("sequence_batching { direct { minimum_slot_utilization: 1.5 } }",
         "sequence_batching.direct.minimum_slot_utilization",
         "sequence batching minimum slot utilization must be in range (0.0, 1.0] for m"),
        ("sequence_batching { oldest { preferred_batch_size: 9 } }",
         "sequence_batching.oldest.preferred_batch_size[0]",
         "sequence batching preferred batch size must be <= max batch size for m"),
        ("model_metrics { metric_control { } }", "model_metrics.metric_control[0]",
         "metric control must specify 'metric_identifier'"),
        ('model_metrics { metric_control { metric_identifier { family: "f" } histogram_options { } } }',
         "model_metrics.metric_control[0]", "histogram options must specify non-empty 'buckets'"),
        ("input { dims: 1 data_type: TYPE_BOOL }", "input[1]", "model input must specify 'name' for m"),
        ('input { name: "I" data_type: TYPE_BOOL dims: [ 1, -2 ] }', "input[1].dims[1]",
         "model input 'I' dimension must be integer >= 1, or -1 to indicate a variable-size dimension for m"),
        ('output { name: "O" data_type: TYPE_BOOL dims: 4 reshape { shape: [ 2, 0 ] } }',
         "output[1].reshape.shape[1]",
         "model output 'O' reshape dimensions must be integer >= 1, or -1 to indicate a variable-size "
         "dimension for m"),
        ('input { name: "I" data_type: TYPE_BOOL dims: [ 2, -1, 3 ] reshape { shape: [ -1, 2, 3 ] } }',
         "input[1].reshape", "model input 'I' has different size for dims and reshape for m"),
        ('input { name: "I" data_type: TYPE_BOOL dims: [ -1 ] reshape { shape: [ -1, -1 ] } }',
         "input[1].reshape",
         "model input 'I' has different number of variable-size dimensions for dims and reshape for m"),
        ('input { name: "I" data_type: TYPE_BOOL dims: 1 format: FORMAT_NHWC }', "input[1].format",
         "model input NHWC/NCHW require 3 dims for m"),
        ('input { name: "I" data_type: TYPE_BOOL dims: 1 is_shape_tensor: true }', "input[1].is_shape_tensor",
         "shape tensors are only supported for TensorRT platform for m"),
        ('output { name: "O" data_type: TYPE_BOOL dims: 1 is_non_linear_format_io: true }',
         "output[1].is_non_linear_format_io",
         "Non-linear IO format is only supported for the TensorRT platform for m"),
        ("batch_input { data_type: TYPE_FP32 }", "batch_input[0]",
         "batch input kind 'BATCH_ELEMENT_COUNT' expects 1 source input, got 0 for m"),
        ('batch_input { data_type: TYPE_INT64 source_input: "X" }', "batch_input[0].data_type",
         "batch input data type must be TYPE_INT32 or TYPE_FP32 for m"),
        ('batch_input { data_type: TYPE_INT32 source_input: "Z" }', "batch_input[0].source_input",
         "unknown source input name 'Z' for m"),
        ('batch_output { source_input: "X" target_name: "Z" }', "batch_output[0].target_name",
         "unknown target output name 'Z' for m"),
        ('batch_output { source_input: "X" target_name: [ "Y", "Y" ] }', "batch_output[0].target_name",
         "target output name 'Y' can only be specified once for m"),
        ('instance_group { name: "g" profile: "0" }', "instance_group[0].profile",
         "instance group g of model m and platform specifies profile field which is only supported for "
         "TensorRT models"),
    ],
)  # fmt: skip
def test_each_problem_has_its_place_and_text(text: str, field: str, expected: str) -> None:
    assert (field, expected) in problems(text)


@pytest.mark.parametrize(
    ("dims", "shape"),
    [("[ 2, 4, -1, 6 ]", "[ 8, -1, 1, 6 ]"), ("[ 1 ]", "[ ]"), ("[ 4 ]", "[ 2, 2 ]"), ("[ -1 ]", "[ 1, -1 ]")],
)
def test_reshapes_that_hold_the_same_elements_are_fine(dims: str, shape: str) -> None:
    tensor = f'input {{ name: "I" data_type: TYPE_BOOL dims: {dims} reshape {{ shape: {shape} }} }}'
    assert problems(tensor) == []


def test_an_empty_reshape_needs_a_batch_axis() -> None:
    tensor = 'input { name: "I" data_type: TYPE_BOOL dims: 1 reshape { } }'
    assert [text for _, text in problems(tensor, head="max_batch_size: 0 ")] == [
        "model input 'I' cannot have empty reshape for non-batching model as scalar tensors are not supported for m"
    ]


ENSEMBLE = 'platform: "ensemble" input { name: "P" data_type: TYPE_FP32 dims: 1 } ' + (
    'output { name: "Q" data_type: TYPE_FP32 dims: 1 } '
)


def step(inputs: str, outputs: str, model: str = "one") -> str:
    maps = [f'input_map {{ key: "{pair[0]}" value: "{pair[1]}" }}' for pair in inputs.split()]
    maps += [f'output_map {{ key: "{pair[0]}" value: "{pair[1]}" }}' for pair in outputs.split()]
    return f'step {{ model_name: "{model}" model_version: -1 {" ".join(maps)} }}'


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("", "must specify 'step' for ensemble 'm'"),
        (step("aP", "bQ", model=""), "must specify 'model_name' in step 0 of ensemble 'm'"),
        (step("", "bQ"), "must specify 'input_map' in step 0 of ensemble 'm'"),
        (step("aP", ""), "must specify 'output_map' in step 0 of ensemble 'm'"),
        (step("aP", "bQ") + step("aP", "bQ"),
         "ensemble tensor 'Q' can appear in an output map only once for ensemble 'm' step 1"),
        (step("aR", "bQ"), "ensemble input 'P' for ensemble m' is not used"),
        (step("aP", "bR"), "ensemble output 'Q' for ensemble m' is not used"),
        (step("aP", "bQ cP"), "ensemble tensor 'P' is an input of ensemble 'm' and made by a step too: one of them "
         "needs another name"),
        (step("aP", "bR") + step("aS cR", "bQ"), "output 'Q' for ensemble 'm' is not written: at least one of "
         "its depending tensors, 'S', is not connected"),
        (step("aP cS", "bQ") + step("aQ", "bS"), "output 'Q' for ensemble 'm' is not written: at least one of "
         "its depending tensors, 'S', is not connected"),
        (step("aP", "bQ cR"), "ensemble tensor 'R' is unused in ensemble 'm'"),
    ],
)  # fmt: skip
def test_ensemble_graphs_must_be_whole(steps: str, expected: str) -> None:
    found = problems(f"ensemble_scheduling {{ {steps} }}", head=ENSEMBLE)
    assert found
    assert found[0][1] == expected


def test_a_whole_ensemble_graph_is_fine() -> None:
    assert problems(f"ensemble_scheduling {{ {step('aP', 'bR') + step('aR cP', 'bQ')} }}", head=ENSEMBLE) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("instance_group { }", "instance group should not be specified for ensemble 'm'"),
        ("optimization { }", "optimization should not be specified for ensemble 'm'"),
        ("model_warmup { }", "model_warmup can not be specified for ensemble 'm'"),
    ],
)
def test_ensembles_have_no_instances(text: str, expected: str) -> None:
    graph = f"ensemble_scheduling {{ {step('aP', 'bQ')} }} {text}"
    assert [found for _, found in problems(graph, head=ENSEMBLE)] == [expected]


def test_the_platform_ensemble_needs_steps() -> None:
    assert [found for _, found in problems("", head=ENSEMBLE)] == [
        "ensemble scheduling must be set for ensemble m whose platform is ensemble"
    ]


PADDED = (
    'max_batch_size: 4 input { name: "X" data_type: TYPE_FP32 dims: [ -1, 3 ] } '
    'output { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] } '
)


@pytest.mark.parametrize(
    ("serving", "field", "expected"),
    [
        ('padding { input: "Z" }', "padding[0].input", "there is no 'Z', only 'X'"),
        ('padding { input: "X" axis: 1 }', "padding[0].axis", "axis 1 of 'X' always has 3 elements"),
        ('padding { input: "X" axis: 2 }', "padding[0].axis", "'X' has no axis 2, its dims are [-1, 3]"),
        ('padding { input: "X" buckets: [ 8, 8 ] }', "padding[0].buckets", "[8, 8] must be at least 1 and ascending"),
        ('padding { input: "X" buckets: 8 multiple_of: 4 }', "padding[0].multiple_of", "can't stand beside buckets"),
        ('padding { input: "X" text_value: "-" }', "padding[0].text_value", "input 'X' holds no texts; give 'value'"),
        ('unpadding { output: "Y" input: "X" }', "unpadding[0].input", "there is no 'X', only none"),
        ("residency: RESIDENCY_TTL", "residency", "RESIDENCY_TTL needs idle_unload_s"),
        ("residency: RESIDENCY_PINNED idle_unload_s: 1", "idle_unload_s", "a pinned model is never unloaded when idle"),
        ('tenants { name: "a" } tenants { name: "a" }', "tenants[1]", "'a' is there twice"),
        ('batching { rule: "module" }', "batching.rule", "'module' is not 'module:function'"),
        ("supervision { window_s: -1 }", "supervision.window_s", "must not be negative"),
    ],
)
def test_what_is_ours_is_checked_too(serving: str, field: str, expected: str) -> None:
    field = f"serving.{field}"
    assert problems(f"serving {{ {serving} }}", head=PADDED) == [(field, f"{field} of model 'm': {expected}")]


def test_padding_that_fits_is_fine() -> None:
    serving = 'padding { input: "X" buckets: [ 8, 16 ] mask_input: "M" } unpadding { output: "Y" input: "X" }'
    assert problems(f"serving {{ {serving} }}", head=PADDED) == []
