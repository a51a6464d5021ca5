"""LLMs on a GPU: transformers' tokens, no waiting in a step, and the memory that the ledger says.

ENGINEHOUSE_TEST_DEVICE=simulated:0 tries what needs no real device.
"""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
import torch
import tritonclient.http as http_client

from enginehouse.testing.server import ServerProcess
from enginehouse.types import SamplingParameters
from enginehouse_backends.llm.runner import StepInput
from tests.acceptance.llm.serving import Serving
from tests.acceptance.llm.small_models import CONFIGS, save_reference
from tests.gpu.llm_shapes import save_shape

DEVICE = os.environ.get("ENGINEHOUSE_TEST_DEVICE", "cuda:0")
ON_GPU = DEVICE.startswith("cuda")
NUM_TOKENS = 24 if ON_GPU else 4
GREEDY = SamplingParameters(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPTS = ([5, 250, 17, 3], list(range(20, 61)), [9] * 11)
GIB = 1 << 30
USED_BEFORE = 0
"""Of the GPU, before the crowd came: this process's own context is there already."""


def greedy(reference: Any, prompt: list[int]) -> list[int]:
    settings = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    with torch.inference_mode():
        ids: list[int] = reference.generate(torch.tensor([prompt]), **settings)[0].tolist()
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS if ON_GPU else ["llama"])
def test_greedy_tokens_are_transformers(name: str, tmp_path: Path) -> None:
    reference = save_reference(name, tmp_path)
    serving = Serving(tmp_path, device=DEVICE, kv_bytes=64 << 20)
    try:
        found = [result.token_ids for result in serving.generate_all(PROMPTS, GREEDY)]
        serving.check()
        assert serving.instance.llm.num_overlapped > 0
    finally:
        serving.close()
    assert found == [greedy(reference, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("quantization", ["fp8", "int8", "int4"])
def test_rounded_weights_answer_alike(quantization: str, tmp_path: Path) -> None:
    """Random weights' logits are flat, so most first tokens agree rather than all."""
    reference = save_reference("quantizable", tmp_path, torch.bfloat16)
    serving = Serving(tmp_path, device=DEVICE, kv_bytes=64 << 20, quantization=quantization)
    try:
        found = [result.token_ids[0] for result in serving.generate_all(PROMPTS, GREEDY)]
    finally:
        serving.close()
    expected = [greedy(reference, prompt)[0] for prompt in PROMPTS]
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= 2


def test_an_fp8_cache_halves_the_blocks_and_answers_alike(tmp_path: Path) -> None:
    reference = save_reference("llama", tmp_path, torch.bfloat16)
    serving = Serving(tmp_path, device=DEVICE, kv_bytes=64 << 20, kv_cache_dtype="fp8")
    try:
        found = [result.token_ids[0] for result in serving.generate_all(PROMPTS, GREEDY)]
        block_bytes = serving.instance.llm.runner.block_bytes
    finally:
        serving.close()
    assert block_bytes == 2 * 3 * 2 * 16 * 16
    expected = [greedy(reference, prompt)[0] for prompt in PROMPTS]
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= 2


def test_starting_a_step_of_decoding_never_waits_for_the_device(tmp_path: Path) -> None:
    """torch raises wherever it would wait while the host starts a step; the one wait is in finishing it."""
    save_reference("llama", tmp_path)
    serving = Serving(tmp_path, device=DEVICE, kv_bytes=64 << 20)
    runner = serving.instance.llm.runner
    start, num_guarded = runner.start, 0

    def guarded(step: StepInput) -> Any:
        nonlocal num_guarded
        if not ON_GPU or len(step.tokens) != len(step.slots):
            return start(step)
        num_guarded += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return start(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    try:
        serving.generate(PROMPTS[0], GREEDY)  # what is made once is made
        runner.start = guarded  # type: ignore[method-assign]  # the step is the runner's, watched from outside
        assert len(serving.generate(PROMPTS[0], GREEDY).token_ids) == NUM_TOKENS
    finally:
        serving.close()
    assert num_guarded > 0 or not ON_GPU


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_tokens_of_one(tmp_path: Path) -> None:
    repository, found = tmp_path, []
    save_reference("llama", repository / "llama")
    for size in (1, 2):
        config = f'backend: "llm" serving {{ llm {{ tensor_parallel_size: {size} }} }}'
        (repository / "llama" / "config.pbtxt").write_text(config)
        with ServerProcess([repository]) as server:
            found.append(complete(server, "llama", PROMPTS[1], NUM_TOKENS))
    assert found[0] == found[1]


def complete(server: ServerProcess, model: str, prompt: list[int], num_tokens: int) -> list[int]:
    client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0, timeout=240)
    more = {"return_token_ids": True, "ignore_eos": True}
    answer: Any = client.completions.create(
        model=model, prompt=prompt, max_tokens=num_tokens, temperature=0, extra_body=more
    )
    found: list[int] = answer.choices[0].token_ids
    return found


# --- two LLMs and an encoder on one GPU

_LLM = """
backend: "llm"
parameters {{ key: "load_format" value {{ string_value: "dummy" }} }}
parameters {{ key: "gpu_memory_utilization" value {{ string_value: "0.3" }} }}
serving {{ llm {{ max_model_len: {length} }} }}
"""
_ENCODER = """
backend: "pytorch" platform: "pytorch_libtorch" max_batch_size: 32
input {{ name: "x" data_type: TYPE_FP32 dims: [ 64, 256 ] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ 64, 256 ] }}
dynamic_batching {{}}
instance_group {{ kind: {kind} }}
"""
LLMS = {"llama": "llama-3.2-1b", "qwen": "qwen2.5-0.5b"} if ON_GPU else {"llama": "tiny", "qwen": "tiny"}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    repository = tmp_path_factory.mktemp("crowd")
    for name, shape in LLMS.items():
        save_shape(shape, repository / name)
        (repository / name / "config.pbtxt").write_text(_LLM.format(length=4096 if ON_GPU else 64))
    folder = repository / "encoder" / "1"
    folder.mkdir(parents=True)
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing asks constants whether they are true
        jit.trace(encoder, torch.randn(2, 64, 256), check_trace=False).save(str(folder / "model.pt"))
    (repository / "encoder" / "config.pbtxt").write_text(_ENCODER.format(kind="KIND_GPU" if ON_GPU else "KIND_CPU"))
    if ON_GPU:
        global USED_BEFORE
        USED_BEFORE = used_bytes()
    flags = [] if ON_GPU else ["--simulated-device=256MiB"]
    with ServerProcess([repository], flags, ready_timeout_s=240) as server:
        yield server


def booked(server: ServerProcess) -> dict[tuple[str, str], int]:
    """By model and kind, of the GPU."""
    found = {}
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("enginehouse_memory_bytes{") and f'device="{DEVICE}"' in line:
                labels = dict(part.split("=", 1) for part in line[line.index("{") + 1 : line.rindex("}")].split(","))
                found[labels["model"].strip('"'), labels["kind"].strip('"')] = int(float(line.rpartition(" ")[2]))
    return found


def test_two_llms_and_an_encoder_work_at_once_within_what_is_booked(crowd: ServerProcess) -> None:
    seconds, counts, failures = (30 if ON_GPU else 3), dict.fromkeys([*LLMS, "encoder"], 0), []
    until_s = time.monotonic() + seconds

    def ask(name: str) -> None:
        random = np.random.default_rng(len(name))
        try:
            while time.monotonic() < until_s:
                if name == "encoder":
                    encode(crowd, random)
                else:
                    prompt = random.integers(3, 250, 128 if ON_GPU else 8).tolist()
                    assert len(complete(crowd, name, prompt, NUM_TOKENS)) == NUM_TOKENS
                counts[name] += 1
        except Exception as error:
            failures.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=ask, args=(name,)) for name in counts for _ in range(8 if ON_GPU else 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert min(counts.values()) > 0
    ledger = booked(crowd)
    named = {f"{model} {kind}": size for (model, kind), size in ledger.items()}
    results: dict[str, Any] = {"booked": named, "requests": counts}
    for name in LLMS:
        assert {kind for model, kind in ledger if model == name} == {"weights", "workspace", "kv"}
    if ON_GPU:
        results |= {"by_process": measured_bytes(crowd), "device": used_bytes() - USED_BEFORE}
    write_result("llm_memory.json", results)
    if ON_GPU:
        llms = sum(size for (model, _), size in ledger.items() if model in LLMS)
        # KV and weights are exact; the workspace is a bound, and CUDA's own contexts and the encoder lie beside it
        assert 0.75 * llms < results["device"] < 1.05 * llms + 3 * GIB, results
        # in a container the driver may not tell whose memory it is
        if results["by_process"]:
            assert 0.75 * llms < max(results["by_process"].values()) < 1.05 * llms + GIB, results


def encode(server: ServerProcess, random: np.random.Generator) -> None:
    value = http_client.InferInput("x", [4, 64, 256], "FP32")
    value.set_data_from_numpy(random.standard_normal((4, 64, 256), dtype=np.float32))
    with http_client.InferenceServerClient(server.http, network_timeout=60.0) as client:
        assert client.infer("encoder", [value]).as_numpy("y").shape == (4, 64, 256)


def measured_bytes(server: ServerProcess) -> dict[int, int]:
    """GPU memory of the server's processes, as NVML says."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    family = {child.pid for child in psutil.Process(server.pid).children(recursive=True)}
    running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return {one.pid: one.usedGpuMemory or 0 for one in running if one.pid in family}


def used_bytes() -> int:
    """Of the whole GPU."""
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def write_result(name: str, found: Any) -> None:
    folder = Path(os.environ.get("ENGINEHOUSE_GPU_RESULTS", "."))
    if "ENGINEHOUSE_GPU_RESULTS" in os.environ:
        (folder / name).write_text(json.dumps(found, indent=1))
