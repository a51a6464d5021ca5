"""A tensor means the same in every form that it can take on a wire; what means nothing is refused politely."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from enginehouse.config.schema import ModelInferRequest
from enginehouse.errors import EnginehouseError
from enginehouse.frontends.http1 import BadRequest, Parser
from enginehouse.frontends.kserve_grpc.incoming import read_request
from enginehouse.frontends.kserve_grpc.infer_codec import decode_request
from enginehouse.frontends.kserve_http.infer_codec import BodyDecoder, dump_json
from enginehouse.frontends.output_options import OutputOptions
from enginehouse.frontends.shared_memory.regions import Regions
from enginehouse.frontends.tensor_json import json_from_tensor
from enginehouse.types import DataType, InferRequest, Tensor

TYPED = {
    DataType.BOOL: "bool_contents", DataType.INT8: "int_contents", DataType.INT16: "int_contents",
    DataType.INT32: "int_contents", DataType.INT64: "int64_contents", DataType.UINT8: "uint_contents",
    DataType.UINT16: "uint_contents", DataType.UINT32: "uint_contents", DataType.UINT64: "uint64_contents",
    DataType.FP32: "fp32_contents", DataType.FP64: "fp64_contents", DataType.BYTES: "bytes_contents",
}  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    datatype = draw(st.sampled_from(list(TYPED)))
    shape = draw(arrays.array_shapes(max_dims=4, max_side=4))
    if datatype is DataType.BYTES:
        size = math.prod(shape)
        texts = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=size, max_size=size))
        values = np.array([text.encode() for text in texts], dtype=object).reshape(shape)
    else:
        floats: dict[str, Any] = {"allow_nan": False} if datatype in (DataType.FP32, DataType.FP64) else {}
        dtype: Any = datatype.numpy
        values = draw(arrays.arrays(dtype, shape, elements=arrays.from_dtype(np.dtype(dtype), **floats)))
    return Tensor.from_numpy("IN", values, datatype)


def decode_http(document: bytes, tail: bytes = b"") -> Tensor:
    request = InferRequest("m")
    BodyDecoder(request, OutputOptions(), Regions(allowed=False), 1 << 20).decode(document + tail, len(document))
    return request.inputs["IN"]


def decode_grpc(message: Any) -> Tensor:
    """The same twice: read, and remembered where that is possible."""
    found = []
    for _ in range(2):
        request, options = InferRequest("m"), OutputOptions()
        decode_request(read_request(message.SerializeToString()), request, options, Regions(allowed=False))
        found.append(request.inputs["IN"])
    assert found[0].shape == found[1].shape
    assert bytes(found[0].host_data()) == bytes(found[1].host_data())
    return found[1]


@given(tensors())
def test_a_tensor_is_the_same_in_every_form(tensor: Tensor) -> None:
    entry: dict[str, Any] = {"name": "IN", "shape": tensor.shape, "datatype": tensor.datatype.wire_name}
    values = json_from_tensor(tensor)
    raw = bytes(tensor.host_data())

    flat = dump_json({"inputs": [{**entry, "data": values}]})
    binary = dump_json({"inputs": [{**entry, "parameters": {"binary_data_size": len(raw)}}]})
    in_raw = ModelInferRequest(model_name="m", raw_input_contents=[raw])
    in_raw.inputs.add(name="IN", datatype=tensor.datatype.wire_name, shape=tensor.shape)
    in_typed = ModelInferRequest(model_name="m")
    typed = in_typed.inputs.add(name="IN", datatype=tensor.datatype.wire_name, shape=tensor.shape)
    getattr(typed.contents, TYPED[tensor.datatype]).extend(tensor.numpy().reshape(-1).tolist())

    for found in (decode_http(flat), decode_http(binary, raw), decode_grpc(in_raw), decode_grpc(in_typed)):
        assert (found.datatype, found.shape) == (tensor.datatype, tensor.shape)
        assert bytes(found.host_data()) == raw


FIELDS = st.sampled_from(["model_name", "model_version", "id"])


@given(
    st.dictionaries(FIELDS, st.text(st.characters(codec="utf-8"), max_size=200)),
    st.lists(st.binary(max_size=300), max_size=4),
    st.booleans(),
    st.binary(max_size=6),
    st.integers(0, 400),
)
def test_any_grpc_message_is_split_as_protobuf_reads_it(
    texts: dict[str, str], raw: list[bytes], has_parameters: bool, garbage: bytes, cut: int
) -> None:
    message = ModelInferRequest(raw_input_contents=raw)
    for name, text in texts.items():
        setattr(message, name, text)
    message.inputs.add(name="IN", datatype="FP32", shape=[1])
    if has_parameters:
        message.parameters["a"].int64_param = 1
    whole = message.SerializeToString()
    for data in (whole, garbage + whole, whole + garbage, whole[:cut]):
        try:
            expected = ModelInferRequest.FromString(data)
        except DecodeError:
            with pytest.raises(EnginehouseError):
                read_request(data)
            continue
        found = read_request(data)
        assert (found.model_name, found.model_version, found.id) == (
            expected.model_name, expected.model_version, expected.id,
        )  # fmt: skip
        assert [bytes(part) for part in found.raw] == list(expected.raw_input_contents)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("IN") | JSON,
        "shape": st.just([2]) | st.lists(st.integers(), max_size=4) | JSON,
        "datatype": st.sampled_from([member.wire_name for member in DataType]) | JSON,
        "data": st.lists(JSON, max_size=4) | JSON,
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "shared_memory_region", "shared_memory_offset", "x"]), JSON, max_size=3
        )
        | JSON,
    },
)
DOCUMENT = st.fixed_dictionaries(
    {"inputs": st.lists(ENTRY, max_size=3) | JSON},
    optional={
        "id": JSON,
        "parameters": st.dictionaries(st.text(max_size=8), JSON, max_size=3) | JSON,
        "outputs": st.lists(st.fixed_dictionaries({"name": JSON}, optional={"parameters": JSON}), max_size=2) | JSON,
    },
)


@given(DOCUMENT | JSON, st.binary(max_size=40))
def test_any_document_is_understood_or_refused(document: Any, tail: bytes) -> None:
    request = InferRequest("m")
    text = json.dumps(document).encode()
    decoder = BodyDecoder(request, OutputOptions(), Regions(allowed=False), 1 << 20)
    with contextlib.suppress(EnginehouseError):
        decoder.decode(text + tail, len(text))


@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode))
def test_any_text_is_understood_or_refused(text: bytes) -> None:
    with pytest.raises(EnginehouseError):
        decode_http(text)


@given(st.lists(st.binary(max_size=30) | st.sampled_from(
    [b"GET / HTTP/1.1\r\n", b"\r\n", b"\r\n\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"5\r\n"]
)))  # fmt: skip
def test_any_bytes_are_requests_or_a_bad_request(pieces: list[bytes]) -> None:
    parser = Parser(100)
    with contextlib.suppress(BadRequest):
        for piece in pieces:
            for request in parser.feed(piece):
                assert len(request.body) <= 100
