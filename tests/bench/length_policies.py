"""`python -m tests.bench.length_policies`: what padding policies are worth, in CPU time and without a server.

The real policies choose batches for a closed loop of clients, ONNX Runtime runs them with one thread, and time is
the process's own, so that others on the machine hardly disturb it. The bound is every request in a batch of its
own length and of the best size. `mixed_lengths` measures the same through servers.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from enginehouse.scheduling.dynamic_batching import BatchPolicy, Cut, DynamicBatching
from enginehouse.scheduling.length_batching import LengthBatching
from enginehouse.scheduling.queue import RequestQueue, Ticket
from enginehouse.types import InferRequest
from tests.bench.mixed_lengths import MAX_BATCH_SIZE, MEASURED_BATCHES, MEASURED_LENGTHS, pooled_minilm
from tests.bench.workloads import ROOT, session

NUM_CLIENTS = 32


@dataclass(frozen=True, slots=True)
class Outcome:
    requests_per_cpu_s: float
    p99_ms: float
    mean_batch: float


def run_batch(runner: Any, lengths: list[int]) -> float:
    """CPU seconds of one padded batch."""
    mask = (np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]).astype(np.int64)
    start_s = time.process_time()
    runner.run(None, {"input_ids": 1000 * mask, "attention_mask": mask})
    return time.process_time() - start_s


def measure(runner: Any, policy: BatchPolicy, limits: tuple[int, int], num_requests: int, is_exact: bool) -> Outcome:
    """`is_exact` lets only equal lengths share a batch."""
    rng, queue, now_s, num_batches = random.Random(7), RequestQueue(), 0.0, 0
    latencies_s: list[float] = []

    def arrive() -> None:
        length = rng.randint(*limits)
        ticket = Ticket(InferRequest("m", batch_size=1), int(now_s * 1e9), length if is_exact else None)
        ticket.length = length
        queue.add(ticket)

    for _ in range(NUM_CLIENTS):
        arrive()
    while len(latencies_s) < num_requests:
        decision = policy.decide(queue, int(now_s * 1e9))
        assert isinstance(decision, Cut), "without a delay there is always something to run"
        queue.cut(decision.tickets)
        seconds = run_batch(runner, [ticket.length for ticket in decision.tickets])
        now_s += seconds
        num_batches += 1
        policy.learn(decision, seconds)
        for ticket in decision.tickets:
            latencies_s.append(now_s - ticket.queued_ns / 1e9)
            arrive()
    latencies_s.sort()
    p99_ms = 1e3 * latencies_s[int(0.99 * len(latencies_s))]
    return Outcome(len(latencies_s) / now_s, p99_ms, len(latencies_s) / num_batches)


def bound(runner: Any, limits: tuple[int, int]) -> float:
    """Requests in a CPU second if each ran in a batch of its own length and of the best size."""
    points = [length for length in MEASURED_LENGTHS if limits[0] <= length <= limits[1]] or list(limits)
    per_row_s = [
        min(min(run_batch(runner, [length] * size) for _ in range(3)) / size for size in MEASURED_BATCHES)
        for length in points
    ]
    rng = random.Random(7)
    return float(1 / np.mean(np.interp([rng.randint(*limits) for _ in range(400)], points, per_row_s)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.length_policies", description=__doc__)
    parser.add_argument("--lengths", default="8-256,4-32")
    parser.add_argument("--requests", type=int, default=240)
    args = parser.parse_args()
    artifact = ROOT / "build" / "bench" / "mixed_lengths" / "minilm_pooled.onnx"
    artifact.parent.mkdir(parents=True, exist_ok=True)
    if not artifact.exists():
        pooled_minilm(artifact)
    runner = session(artifact)
    run_batch(runner, [64] * 4)
    for text in args.lengths.split(","):
        shortest, longest = map(int, text.split("-"))
        most = bound(runner, (shortest, longest))
        print(f"{shortest} to {longest} tokens, {NUM_CLIENTS} clients; bound {most:.1f} requests in a CPU second")
        plain = DynamicBatching(MAX_BATCH_SIZE)
        policies: list[tuple[str, BatchPolicy, bool]] = [
            ("padding on", LengthBatching(plain, max), False),
            ("equal lengths only", plain, True),
            ("padded in order of arrival", plain, False),
        ]
        for title, policy, is_exact in policies:
            got = measure(runner, policy, (shortest, longest), args.requests, is_exact)
            print(
                f"  {title:<27} {got.requests_per_cpu_s:>6.1f}  {got.requests_per_cpu_s / most:>4.0%} of the bound  "
                f"p99 {got.p99_ms:>6.0f} ms  {got.mean_batch:>4.1f} a batch",
                flush=True,
            )


if __name__ == "__main__":
    main()
