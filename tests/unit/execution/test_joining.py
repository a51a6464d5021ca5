"""A batch's tensors are its requests' bytes one after the other; its outputs go back by rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginehouse.config.schema import ModelConfig
from enginehouse.errors import Internal
from enginehouse.execution.joining import Joiner, split_rows
from enginehouse.types import Array, DataType, InferRequest, Tensor


def request_of(rows: int, requested: tuple[str, ...] = (), **arrays: Array) -> InferRequest:
    inputs = {name: Tensor.from_numpy(name, array) for name, array in arrays.items()}
    return InferRequest("m", inputs=inputs, requested_outputs=requested, batch_size=rows)


def test_one_request_is_not_copied() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    [joined] = Joiner().join([request_of(2, X=array)])
    assert joined.shape == (2, 3)
    assert np.shares_memory(joined.gather().numpy(), array)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.sampled_from(["f4", "i8", "?", "O"]))
def test_joined_rows_are_the_requests_rows_in_order(rows: list[int], code: str) -> None:
    texts = [[[f"{i}.{row}", "x" * row] for row in range(count)] for i, count in enumerate(rows)]
    arrays = [np.array(rows_of_text, dtype=object) for rows_of_text in texts]
    if code != "O":
        arrays = [np.vectorize(len)(array).astype(code) for array in arrays]
    requests = [request_of(len(array), X=array) for array in arrays]
    joiner = Joiner(["Y"])
    [joined] = joiner.join(requests)
    batch = joined.gather()
    answers = joiner.split(requests, {"Y": Tensor("Y", batch.datatype, batch.shape, batch.data)})
    assert batch.shape == (sum(rows), 2)
    for request, [answer] in zip(requests, answers, strict=True):
        assert answer.shape == request.inputs["X"].shape
        assert bytes(answer.host_data()) == bytes(request.inputs["X"].host_data())


def test_a_request_gets_what_it_asked_for_in_the_models_order() -> None:
    joiner = Joiner(["A", "B"])
    requests = [request_of(1, ("B", "A"), X=np.zeros((1, 1))), request_of(1, ("B",), X=np.zeros((1, 1)))]
    outputs = {name: Tensor.from_numpy(name, np.zeros((2, 1))) for name in ("A", "UNKNOWN", "B")}
    names = [[tensor.name for tensor in answer] for answer in joiner.split(requests, outputs)]
    assert names == [["A", "B"], ["B"]]
    assert sorted(joiner.requested_outputs(requests)) == ["A", "B"]


def test_everything_is_computed_if_one_request_asks_for_everything() -> None:
    assert Joiner(["A", "B"]).requested_outputs([request_of(1, ("A",)), request_of(1)]) == []


def test_output_with_other_rows_than_the_batch_is_the_models_fault() -> None:
    with pytest.raises(Internal, match=r"output 'Y' has shape \[3\], but the batch has 4 rows"):
        split_rows(Tensor.from_numpy("Y", np.zeros(3)), [1, 3])


def test_wrong_shape_of_a_single_request_passes_through() -> None:
    answers = Joiner(["Y"]).split([request_of(2)], {"Y": Tensor.from_numpy("Y", np.zeros(3))})
    assert answers[0][0].shape == (3,)


def test_bf16_keeps_its_type() -> None:
    tensor = Tensor("X", DataType.BF16, (2, 2), memoryview(bytes(8)))
    joined = Joiner().join([InferRequest("m", inputs={"X": tensor}, batch_size=2)] * 2)
    assert (joined[0].datatype, joined[0].shape, joined[0].nbytes) == (DataType.BF16, (4, 2), 16)


def test_state_outputs_come_along_whatever_a_request_asks_for() -> None:
    config = ModelConfig(max_batch_size=4)
    config.output.add(name="Y")
    config.sequence_batching.state.add(input_name="S_IN", output_name="S_OUT")
    joiner = Joiner.of_config(config)
    request = InferRequest("m", requested_outputs=["Y"], batch_size=1)
    assert set(joiner.requested_outputs([request])) == {"Y", "S_OUT"}
    outputs = {name: Tensor.from_numpy(name, np.zeros((1, 1), np.float32)) for name in ("Y", "Z", "S_OUT")}
    assert [tensor.name for tensor in joiner.split([request], outputs)[0]] == ["Y", "S_OUT"]
    assert [tensor.name for tensor in joiner.pick(request, list(outputs.values()))] == ["Y", "S_OUT"]


def test_state_outputs_go_along_with_whatever_was_asked_for() -> None:
    joiner = Joiner(["A", "B"], ["STATE"])
    request = request_of(1, ("B",))
    outputs = {name: Tensor.from_numpy(name, np.zeros((1, 1))) for name in ("A", "B", "STATE")}
    assert [tensor.name for tensor in joiner.split([request], outputs)[0]] == ["B", "STATE"]
    assert sorted(joiner.requested_outputs([request])) == ["B", "STATE"]
