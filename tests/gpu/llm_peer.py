"""vLLM on the same shape and load, where it is installed: tokens a second beside ours.

    python -m tests.gpu.llm_peer [--shape llama-3.1-8b]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.gpu.llm_shapes import SHAPES, save_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.1-8b")
    shape = parser.parse_args().shape
    if importlib.util.find_spec("vllm") is None:
        print("vLLM isn't installed here: nothing to compare with")
        return
    import vllm  # type: ignore[import-not-found]  # optional

    folder = save_shape(shape, Path(tempfile.mkdtemp()))
    engine: Any = vllm.LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=9216,
        max_num_batched_tokens=8192, gpu_memory_utilization=0.9, enable_prefix_caching=False,
    )  # fmt: skip
    random = np.random.default_rng(1)
    for count, length, num_tokens in ((1, 512, 256), (32, 512, 128), (256, 512, 128), (1, 8192, 1)):
        prompts = [
            {"prompt_token_ids": random.integers(3, SHAPES[shape]["vocab_size"], length).tolist()}
            for _ in range(count)
        ]
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        engine.generate(prompts[:8], sampling, use_tqdm=False)
        started_s = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started_s
        line = {
            "what": f"vLLM {vllm.__version__}, {count} at once", "length": length, "num_tokens": num_tokens,
            "seconds": round(seconds, 4), "tokens_per_s": round(count * num_tokens / seconds, 1), "shape": shape,
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        with (Path(os.environ.get("ENGINEHOUSE_GPU_RESULTS", ".")) / "llm.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
