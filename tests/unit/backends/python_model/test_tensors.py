"""pb_utils.Tensor over numpy and over DLPack, torch at the other end."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from enginehouse.types import DataType
from enginehouse.types import Tensor as WireTensor
from enginehouse_backends.python_model import dlpack
from enginehouse_backends.python_model.errors import TritonModelException
from enginehouse_backends.python_model.tensor import Tensor

NUMBERS = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]


@pytest.mark.parametrize("code", NUMBERS)
def test_numpy_there_and_back(code: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(code)
    wire = Tensor("T", array).to_wire()
    assert (wire.datatype.numpy, wire.shape) == (array.dtype, (2, 3))
    assert Tensor.of_wire(wire).as_numpy().tolist() == array.tolist()


@pytest.mark.parametrize("array", [np.array([b"a", b"bc"]), np.array([b"a", "bc"], dtype=object)])
def test_strings_may_be_bytes_or_objects(array: np.ndarray) -> None:
    wire = Tensor("T", array).to_wire()
    assert (wire.datatype, wire.numpy().tolist()) == (DataType.BYTES, [b"a", b"bc"])


def test_numpy_text_is_refused_as_triton_does() -> None:
    with pytest.raises(TritonModelException, match=r"NumPy dtype is not supported"):
        Tensor("T", np.array(["text"]))


def test_a_type_that_the_protocol_lacks_is_refused() -> None:
    with pytest.raises(TritonModelException, match="NumPy dtype is not supported"):
        Tensor("T", np.zeros(1, complex))


def test_a_view_with_strides_is_made_contiguous() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert Tensor("T", array.T).to_wire().numpy().tolist() == array.T.tolist()
    assert Tensor("T", array[::-1]).to_wire().numpy().tolist() == array[::-1].tolist()


def test_scalars_and_empty_tensors() -> None:
    assert Tensor("T", np.array(5, np.int32)).to_wire().shape == ()
    assert Tensor("T", np.zeros((0, 3), np.float32)).to_wire().nbytes == 0


@pytest.mark.parametrize("code", [code for code in NUMBERS if code not in ("u2", "u4", "u8")])
def test_torch_takes_our_memory_and_gives_its_own(code: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(code)
    there = from_dlpack(Tensor("T", array))
    assert there.numpy().tolist() == array.tolist()
    back = Tensor.from_dlpack("B", there)
    assert (back.name(), back.as_numpy().tolist()) == ("B", array.tolist())


def test_memory_is_shared_not_copied() -> None:
    array = np.zeros(3, np.float32)
    shared = from_dlpack(Tensor("T", array))
    shared[1] = 7
    assert array.tolist() == [0, 7, 0]


def test_bf16_passes_through_dlpack_alone() -> None:
    made = Tensor.from_dlpack("T", torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    assert made.to_wire().datatype is DataType.BF16
    with pytest.raises(TritonModelException, match="BF16 is not supported by NumPy"):
        made.as_numpy()
    again = Tensor.from_dlpack("T", made.to_dlpack())
    assert from_dlpack(again).tolist() == [1.5, -2.0]


def test_strings_have_no_dlpack() -> None:
    with pytest.raises(TritonModelException, match="DLPack does not have support for string tensors"):
        Tensor("T", np.array([b"x"])).to_dlpack()


def test_a_tensor_with_strides_is_refused() -> None:
    with pytest.raises(TritonModelException, match="DLPack tensor is not contiguous"):
        Tensor.from_dlpack("T", torch.zeros(2, 3).T)


def test_a_capsule_is_used_once() -> None:
    capsule = Tensor("T", np.zeros(2)).to_dlpack()
    Tensor.from_dlpack("A", capsule)
    with pytest.raises(TritonModelException, match="no DLPack capsule that is still unused"):
        Tensor.from_dlpack("B", capsule)


def test_nothing_stays_behind_whoever_takes_the_capsule() -> None:
    gc.collect()
    before = len(dlpack._exported)
    data = memoryview(bytearray(64))
    unused = Tensor.of_wire(WireTensor("T", DataType.UINT8, (64,), data)).to_dlpack()
    by_torch = from_dlpack(Tensor.of_wire(WireTensor("T", DataType.UINT8, (64,), data)))
    by_us = Tensor.from_dlpack("T", Tensor.of_wire(WireTensor("T", DataType.UINT8, (64,), data)).to_dlpack())
    assert len(dlpack._exported) == before + 3
    del unused, by_torch, by_us
    gc.collect()
    assert len(dlpack._exported) == before
    data.release()


def test_an_adopted_tensor_keeps_its_owner_alive() -> None:
    adopted = Tensor.from_dlpack("T", torch.arange(1000)).to_wire()
    gc.collect()
    assert adopted.numpy().tolist() == list(range(1000))
