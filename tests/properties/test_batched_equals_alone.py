"""What a request gets in a batch is what it gets alone: over types, shapes, sizes and orders of arrival.

Queue, batcher, loop, joiner and splitter are the real ones; the model is a function of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.config.schema import ModelConfig
from enginehouse.execution.joiners import joiner_of
from enginehouse.scheduling.build import build_scheduler
from enginehouse.testing.clock import ManualClock
from enginehouse.testing.instances import Function, GatedInstance
from enginehouse.types import VALID_TYPES, Array, DataType, InferRequest, InferResponse, Tensor

NUMERIC = [one for one in VALID_TYPES if one not in (DataType.BYTES, DataType.BF16)]


class Silent:
    """An observer that looks away."""

    def on_batch(self, *args: object) -> None: ...
    def on_cache_hit(self, *args: object) -> None: ...
    def on_cache_miss(self, *args: object) -> None: ...
    def on_response(self, *args: object) -> None: ...


def config_of(text: str) -> ModelConfig:
    config = ModelConfig()
    text_format.Parse(text, config)
    return config


def serve(
    config: ModelConfig, function: Function, arrivals: list[tuple[dict[str, Array], int]], num_instances: int = 1
) -> list[InferResponse]:
    """The answers to requests that arrive with these pauses (in microseconds) between them."""
    clock = ManualClock()
    joiner = joiner_of(config)
    instances = [GatedInstance(function, clock.now_ns, f"m_{index}", joiner=joiner) for index in range(num_instances)]
    scheduler = build_scheduler(config, 1, instances, Silent(), lambda request: None, clock=clock)
    answers: dict[int, InferResponse] = {}
    for number, (arrays, pause_us) in enumerate(arrivals):
        inputs = {name: Tensor.from_numpy(name, array) for name, array in arrays.items()}
        request = InferRequest("m", inputs=inputs, batch_size=next(iter(arrays.values())).shape[0])
        request.sink = lambda response, number=number: answers.__setitem__(number, response)
        scheduler.submit(request)
        clock.advance(us=pause_us)
        if pause_us % 3 == 0:
            finish_one(instances)
    for _ in range(1000):
        clock.advance(ms=1)
        if not finish_one(instances) and len(answers) == len(arrivals):
            break
    assert scheduler.num_in_flight == 0
    return [answers[number] for number in range(len(arrivals))]


def finish_one(instances: list[GatedInstance]) -> bool:
    for instance in instances:
        if instance.waiting:
            instance.step()
            return True
    return False


def check(
    config: ModelConfig, function: Function, arrivals: list[tuple[dict[str, Array], int]], instances: int
) -> None:
    together = serve(config, function, arrivals, instances)
    for arrival, response in zip(arrivals, together, strict=True):
        [alone] = serve(config, function, [arrival])
        assert response.error is None
        assert [tensor.name for tensor in response.outputs] == [tensor.name for tensor in alone.outputs]
        for batched, single in zip(response.outputs, alone.outputs, strict=True):
            assert batched.shape == single.shape
            assert batched.datatype is single.datatype
            assert bytes(batched.host_data()) == bytes(single.host_data())


def reversed_rows(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """Each row backwards, and its size: depends on nothing but the row."""
    x = inputs["X"]
    flipped = np.ascontiguousarray(np.flip(x.reshape(len(x), -1), axis=1)).reshape(x.shape)
    return {"Y": flipped, "N": np.full((len(x), 1), x[0].size, np.int32)}


def array_of(datatype: DataType, shape: tuple[int, ...], seed: int) -> Array:
    rng = np.random.default_rng(seed)
    if datatype is DataType.BYTES:
        texts = np.array(["x" * number for number in rng.integers(0, 5, int(np.prod(shape)))], object)
        return texts.reshape(shape)
    if datatype is DataType.BOOL:
        return rng.integers(0, 2, shape).astype(np.bool_)
    return rng.integers(0, 100, shape).astype(datatype.numpy)


@settings(deadline=None, max_examples=60)
@given(
    datatype=st.sampled_from([*NUMERIC, DataType.BYTES]),
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 400)), min_size=1, max_size=8),
    delay_us=st.sampled_from([0, 300]),
    preferred=st.sampled_from(["", "preferred_batch_size: [3]", "preserve_ordering: true"]),
    instances=st.integers(1, 2),
    seed=st.integers(0, 2**16),
)
def test_dynamic_batching(
    datatype: DataType, sizes: list[tuple[int, int, int]], delay_us: int, preferred: str, instances: int, seed: int
) -> None:
    config = config_of(
        f"""name: "m" max_batch_size: 4
        input {{ name: "X" data_type: {datatype.config_name} dims: [-1, 2] }}
        output {{ name: "Y" data_type: {datatype.config_name} dims: [-1, 2] }}
        output {{ name: "N" data_type: TYPE_INT32 dims: [1] }}
        dynamic_batching {{ max_queue_delay_microseconds: {delay_us} {preferred} }}"""
    )
    arrivals: list[tuple[dict[str, Array], int]] = [
        ({"X": array_of(datatype, (rows, width, 2), seed + number)}, pause_us)
        for number, (rows, width, pause_us) in enumerate(sizes)
    ]
    check(config, reversed_rows, arrivals, instances)


def masked_prefix_sums(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """As an encoder does: each position sees the real ones before it, the pooled value all real ones."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return {
        "hidden": np.cumsum(ids * mask, axis=1)[:, :, None].repeat(2, axis=2).astype(np.int64),
        "pooled": (ids * mask).sum(axis=1, keepdims=True).astype(np.int64),
    }


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(0, 400)), min_size=1, max_size=8),
    buckets=st.sampled_from(["", "multiple_of: 4", "buckets: [4, 8]"]),
    delay_us=st.sampled_from([0, 300]),
    seed=st.integers(0, 2**16),
)
def test_padded_batches(lengths: list[tuple[int, int, int]], buckets: str, delay_us: int, seed: int) -> None:
    declared = " ".join(f'padding {{ input: "{name}" {buckets} }}' for name in ("input_ids", "attention_mask"))
    serving = f'serving {{ {declared} unpadding {{ output: "hidden" }} }}' if buckets else ""
    config = config_of(
        f"""name: "m" max_batch_size: 4
        input {{ name: "input_ids" data_type: TYPE_INT64 dims: [-1] }}
        input {{ name: "attention_mask" data_type: TYPE_INT64 dims: [-1] }}
        output {{ name: "hidden" data_type: TYPE_INT64 dims: [-1, 2] }}
        output {{ name: "pooled" data_type: TYPE_INT64 dims: [1] }}
        dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }} {serving}"""
    )
    rng = np.random.default_rng(seed)
    arrivals: list[tuple[dict[str, Array], int]] = [
        (
            {
                "input_ids": rng.integers(1, 100, (rows, length)).astype(np.int64),
                "attention_mask": np.ones((rows, length), np.int64),
            },
            pause_us,
        )
        for rows, length, pause_us in lengths
    ]
    check(config, masked_prefix_sums, arrivals, 1)


def doubled_flat(inputs: Mapping[str, Any]) -> Mapping[str, Array]:
    """A model that takes ragged input: elementwise on the flat tensor, with the ends given beside it."""
    flat, ends = inputs["X"], inputs["ENDS"]
    starts = np.concatenate(([0], ends[:-1])).astype(int)
    sums = [flat[start:end].sum() for start, end in zip(starts, ends.astype(int), strict=True)]
    return {"Y": 2 * flat, "SUM": np.array(sums, np.float32).reshape(-1, 1)}


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 400)), min_size=1, max_size=8))
def test_ragged_batches(lengths: list[tuple[int, int]]) -> None:
    config = config_of(
        """name: "m" max_batch_size: 4
        input { name: "X" data_type: TYPE_FP32 dims: [-1] allow_ragged_batch: true }
        output { name: "Y" data_type: TYPE_FP32 dims: [-1] }
        output { name: "SUM" data_type: TYPE_FP32 dims: [1] }
        batch_input { kind: BATCH_ACCUMULATED_ELEMENT_COUNT target_name: "ENDS" data_type: TYPE_FP32 source_input: "X" }
        batch_output { kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "Y" source_input: "X" }
        dynamic_batching { max_queue_delay_microseconds: 300 }"""
    )
    arrivals: list[tuple[dict[str, Array], int]] = [
        ({"X": np.arange(length, dtype=np.float32).reshape(1, -1) + length}, pause_us) for length, pause_us in lengths
    ]
    check(config, doubled_flat, arrivals, 1)
