"""MiniLM on the GPU in each backend, called directly: rows a second by batch size. Writes each line as it comes.

No claims are made here about the server's own cost: `make bench` measures that, and this shows what it rests on.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from enginehouse.backend import TensorInstance
from enginehouse.errors import EnginehouseError
from enginehouse.types import Tensor
from enginehouse_backends.onnx_runtime import OnnxRuntimeBackend
from tests.acceptance.conftest import EXAMPLES
from tests.gpu.test_backends import GPU, config_text, instance_of, token_inputs

BATCH_SIZES = (1, 8, 32, 128)
NUM_TOKENS = 32
SECONDS = 3.0
MAX_BATCH = "max_batch_size: 128"


def onnx_runtime(text: str = "") -> TensorInstance:
    config = config_text("minilm").replace("max_batch_size: 32", MAX_BATCH)
    return instance_of(OnnxRuntimeBackend(), EXAMPLES / "minilm", config + text, GPU)


def tensorrt(precision: str, graphs: bool) -> TensorInstance:
    from enginehouse_backends.tensorrt_engine import TensorRTBackend
    from enginehouse_backends.tensorrt_engine.convert import convert

    folder = Path(tempfile.mkdtemp())
    (folder / "1").mkdir()
    shapes = [part for name in ("input_ids", "attention_mask") for part in ("--shapes", f"{name}=1x1:32x32:128x128")]
    files = [str(EXAMPLES / "minilm" / "1" / "model.onnx"), str(folder / "1" / "model.plan")]
    answer = CliRunner().invoke(convert, [*files, *shapes, "--precision", precision])
    if answer.exit_code:
        raise RuntimeError(answer.output.strip())
    dims = " ".join(
        f'input {{ key: "{name}" value {{ dim: [{NUM_TOKENS}] }} }}' for name in ("input_ids", "attention_mask")
    )
    specs = " ".join(f"graph_spec {{ batch_size: {size} {dims} }}" for size in BATCH_SIZES)
    text = f"optimization {{ cuda {{ graphs: true {specs} }} }}" if graphs else ""
    return instance_of(TensorRTBackend(), folder, text, GPU)


CONTESTANTS: Mapping[str, Callable[[], TensorInstance]] = {
    "onnxruntime, CUDA": onnx_runtime,
    "tensorrt": lambda: tensorrt("as-is", graphs=False),
    "tensorrt, fp16": lambda: tensorrt("fp16", graphs=False),
    "tensorrt, fp16, CUDA graphs": lambda: tensorrt("fp16", graphs=True),
}


def rows_per_second(instance: TensorInstance, inputs: dict[str, Tensor], num_rows: int) -> float:
    for _ in range(5):
        instance.run(inputs, [])
    started_s, num_runs = time.perf_counter(), 0
    while time.perf_counter() - started_s < SECONDS:
        instance.run(inputs, [])
        num_runs += 1
    return num_runs * num_rows / (time.perf_counter() - started_s)


def main() -> None:
    results = Path(os.environ.get("ENGINEHOUSE_GPU_RESULTS", "."))
    with (results / "speed.jsonl").open("a") as file:
        for name, make in CONTESTANTS.items():
            for line in measure(name, make):
                print(line, flush=True)
                file.write(json.dumps(line) + "\n")
                file.flush()


def measure(name: str, make: Callable[[], TensorInstance]) -> Any:
    base = {"what": name, "gpu": torch.cuda.get_device_name(GPU), "tokens": NUM_TOKENS}
    try:
        instance = make()
    except (EnginehouseError, RuntimeError, ImportError) as problem:
        yield {**base, "problem": str(problem)}
        return
    for size in BATCH_SIZES:
        rate = rows_per_second(instance, token_inputs([NUM_TOKENS] * size), size)
        yield {**base, "batch": size, "rows_per_second": round(rate, 1)}
    instance.close()


if __name__ == "__main__":
    main()
