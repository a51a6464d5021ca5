"""Reading an ONNX file's inputs and outputs without loading it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from enginehouse.errors import InvalidArgument
from enginehouse_backends.onnx_runtime.onnx_file import OnnxValue, read_onnx_file

from .onnx_models import identity, save, scaled, value


def test_names_types_and_dims_are_those_of_the_onnx_package(tmp_path: Path) -> None:
    file = read_onnx_file(identity(tmp_path / "model.onnx", TensorProto.INT64, ["batch", None, 3]))
    assert file.inputs == (OnnxValue("INPUT", TensorProto.INT64, ("batch", "", 3)),)
    assert file.outputs == (OnnxValue("OUTPUT", TensorProto.INT64, ("batch", "", 3)),)


def test_input_with_an_initializer_is_one_that_may_be_left_out(tmp_path: Path) -> None:
    file = read_onnx_file(scaled(tmp_path / "model.onnx"))
    assert [v.name for v in file.inputs] == ["INPUT"]
    assert [v.name for v in file.defaulted_inputs] == ["SCALE"]


def test_missing_shape_differs_from_no_dimensions(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["INPUT"], ["OUTPUT"])]
    inputs = [value("INPUT", TensorProto.FLOAT, [])]
    file = read_onnx_file(save(tmp_path / "m.onnx", nodes, inputs, [value("OUTPUT", TensorProto.FLOAT, None)]))
    assert (file.inputs[0].dims, file.outputs[0].dims) == ((), None)


def test_files_that_hold_weights_are_named(tmp_path: Path) -> None:
    path = scaled(tmp_path / "model.onnx")
    onnx.save_model(onnx.load(path), str(path), save_as_external_data=True, location="big.bin", size_threshold=0)
    assert read_onnx_file(path).external_files == ("big.bin",)


def test_sequence_output_is_no_tensor(tmp_path: Path) -> None:
    nodes = [helper.make_node("SequenceConstruct", ["INPUT"], ["OUTPUT"])]
    sequence = helper.make_tensor_sequence_value_info("OUTPUT", TensorProto.FLOAT, ["n"])
    path = save(tmp_path / "model.onnx", nodes, [value("INPUT", TensorProto.FLOAT, ["n"])], [sequence])
    (output,) = read_onnx_file(path).outputs
    assert (output.kind, output.element_type) == ("sequence", 0)


@given(st.binary(max_size=64))
@example(b"\x00\x00\x02\x00")  # ends the reading within views of the mapped file
@settings(max_examples=300)
def test_any_bytes_are_read_or_refused_by_name(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.onnx"
    path.write_bytes(junk)
    with pytest.raises(InvalidArgument, match=r"junk\.onnx is (empty|not an ONNX model)"):
        read_onnx_file(path)


def test_file_cut_off_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = scaled(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidArgument, match="ends in the middle"):
        read_onnx_file(path)
