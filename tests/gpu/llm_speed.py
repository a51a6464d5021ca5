"""An LLM with random weights on one GPU, in the engine itself: each number beside what the hardware allows.

    python -m tests.gpu.llm_speed decode|concurrent|prefill … [--num 32] [--device cuda:0] [--shape llama-3.1-8b]

Each result is a line of llm.jsonl in the results' folder as soon as it is there. `--device simulated:0 --shape tiny`
tries the code where there is no GPU; its numbers mean nothing. `--device cpu --shape qwen2.5-0.5b` measures a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from enginehouse.types import SamplingParameters, TokenEvent
from enginehouse_backends.llm.architecture import Architecture, read_architecture
from enginehouse_backends.llm.random_checkpoint import RandomCheckpoint
from tests.acceptance.llm.serving import Serving
from tests.gpu.limits import Limits, limits_of
from tests.gpu.llm_shapes import save_shape


@dataclass
class Times:
    """When each token of a request came."""

    submitted_s: float
    token_s: list[float] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        return self.token_s[0] - self.submitted_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]


class TimedServing(Serving):
    """Notes when events come. Events of one step come together, so each has one token."""

    times: dict[str, Times]

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.times = defaultdict(lambda: Times(0.0))
        super().__init__(*arguments, **settings)

    def _take(self, events: Sequence[TokenEvent]) -> None:
        now_s = time.perf_counter()
        for event in events:
            self.times[event.request_id].token_s.extend([now_s] * len(event.token_ids))
        super()._take(events)

    def load(self, prompts: Sequence[list[int]], num_tokens: int) -> tuple[float, list[Times]]:
        """All at once. Seconds until the last is done, and each one's times."""
        sampling = SamplingParameters(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        started_s = time.perf_counter()
        ids = []
        for prompt in prompts:
            submitted_s = time.perf_counter()
            ids.append(self.submit(prompt, sampling, stream=True))
            self.times[ids[-1]].submitted_s = submitted_s
        for request_id in ids:
            while self.next_event(request_id).finish_reason is None:
                pass
        return time.perf_counter() - started_s, [self.times[request_id] for request_id in ids]


class Bench:
    """One model on one device, its limits, and the file of results."""

    def __init__(self, shape: str, device: str, **settings: Any) -> None:
        folder = save_shape(shape, Path(tempfile.mkdtemp()))
        self.shape, self.device = shape, device
        self.architecture: Architecture = read_architecture(folder)
        chosen = torch.device(device) if device.startswith("cuda") else torch.device("cpu")
        self.limits: Limits = limits_of(chosen)
        started_s = time.perf_counter()
        self.serving = TimedServing(
            folder, kv_bytes=0 if device.startswith("cuda") else 256 << 20, parameters={"load_format": "dummy"},
            device=device, **settings,
        )  # fmt: skip
        self.load_s = time.perf_counter() - started_s
        checkpoint = RandomCheckpoint(folder, self.architecture)
        sizes = {name: checkpoint.stored(name).stop for name in checkpoint.names}
        embedding = 0 if self.architecture.tied_embeddings else sizes["model.embed_tokens.weight"]
        self.read_bytes = sum(sizes.values()) - embedding
        """Of weights, for each step."""
        itemsize = checkpoint.stored("model.norm.weight").dtype.itemsize
        head = 0 if self.architecture.tied_embeddings else sizes["lm_head.weight"]
        self.block_parameters = (sum(sizes.values()) - sizes["model.embed_tokens.weight"] - head) // itemsize
        a = self.architecture
        self.token_bytes = 2 * a.num_layers * a.num_kv_heads * a.head_dim * itemsize
        self._random = np.random.default_rng(1)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        vocab = self.architecture.vocab_size
        return [self._random.integers(3, vocab, length).tolist() for _ in range(count)]

    def prefill_flops(self, length: int) -> float:
        """Of one prompt: products with the weights, and causal attention."""
        a = self.architecture
        attention = 2.0 * a.num_layers * a.num_heads * a.head_dim * length * length
        return 2.0 * self.block_parameters * length + attention

    def tell(self, **numbers: Any) -> None:
        line = {
            "shape": self.shape, "device": self.device, **dataclasses.asdict(self.limits), **numbers,
            "attention": getattr(self.serving.instance._runner, "attention_choice", ""),
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        text = json.dumps({key: round(v, 6) if isinstance(v, float) else v for key, v in line.items()})
        print(text, flush=True)
        with (Path(os.environ.get("ENGINEHOUSE_GPU_RESULTS", ".")) / "llm.jsonl").open("a") as file:
            file.write(text + "\n")


def decode(bench: Bench, context: int, num_tokens: int) -> None:
    """One sequence: time between tokens beside reading the weights and its keys and values once."""
    bench.serving.load(bench.prompts(1, context), min(num_tokens, 16))
    _, [times] = bench.serving.load(bench.prompts(1, context), num_tokens)
    gap_s = statistics.median(times.gaps_s)
    read = bench.read_bytes + bench.token_bytes * (context + num_tokens / 2)
    bench.tell(
        what="decode, batch 1", context=context, itl_ms=1e3 * gap_s, tokens_per_s=1 / gap_s,
        limit_ms_told=1e3 * read / bench.limits.told_bytes_per_s,
        share_of_told_limit=read / bench.limits.told_bytes_per_s / gap_s,
        share_of_measured_limit=read / bench.limits.measured_bytes_per_s / gap_s, load_s=bench.load_s,
    )  # fmt: skip


def concurrent(bench: Bench, count: int, length: int, num_tokens: int) -> None:
    """Requests at once: tokens a second, time to the first and between tokens, beside the roofline's."""
    bench.serving.load(bench.prompts(min(count, 8), length), 4)
    seconds, all_times = bench.serving.load(bench.prompts(count, length), num_tokens)
    firsts = sorted(times.first_s for times in all_times)
    gaps = sorted(gap for times in all_times for gap in times.gaps_s)
    read = bench.read_bytes + count * bench.token_bytes * (length + num_tokens / 2)
    least_s = count * bench.prefill_flops(length) / bench.limits.told_flops
    least_s += num_tokens * read / bench.limits.told_bytes_per_s
    bench.tell(
        what=f"{count} at once", length=length, num_tokens=num_tokens, seconds=seconds,
        tokens_per_s=count * num_tokens / seconds, limit_tokens_per_s=count * num_tokens / least_s,
        ttft_ms_p50=1e3 * _at(firsts, 0.5), ttft_ms_p99=1e3 * _at(firsts, 0.99),
        itl_ms_p50=1e3 * _at(gaps, 0.5), itl_ms_p99=1e3 * _at(gaps, 0.99),
        overlapped=bench.serving.instance.llm.num_overlapped,
    )  # fmt: skip


def prefill(bench: Bench, length: int, count: int) -> None:
    """Long prompts one after the other, one token each: the share of the arithmetic that is used (MFU)."""
    bench.serving.load(bench.prompts(1, length), 1)
    seconds = 0.0
    for prompt in bench.prompts(count, length):
        seconds += bench.serving.load([prompt], 1)[0]
    flops = count * bench.prefill_flops(length) / seconds
    bench.tell(
        what="prefill", length=length, seconds_each=seconds / count, tokens_per_s=count * length / seconds,
        mfu_told=flops / bench.limits.told_flops, mfu_measured=flops / bench.limits.measured_flops,
    )  # fmt: skip


def _at(values: Sequence[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)] if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["decode", "concurrent", "prefill"])
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--quantization", default="")
    asked = parser.parse_args()
    small, on_gpu = asked.shape == "tiny", asked.device.startswith("cuda")
    longest = 128 if small else 9216 if on_gpu else 1024
    parameters = {"max_model_len": longest, "quantization": asked.quantization}
    bench = Bench(asked.shape, asked.device, **parameters)
    try:
        match asked.what:
            case "decode":
                for context in (16,) if small else (512, 8192) if on_gpu else (512,):
                    decode(bench, context, 8 if small else 256)
            case "concurrent":
                concurrent(bench, asked.num, *((20, 3) if small else (512, 128)))
            case "prefill":
                prefill(bench, 64 if small else 8192, 2 if small else 8)
    finally:
        bench.serving.close()


if __name__ == "__main__":
    main()
