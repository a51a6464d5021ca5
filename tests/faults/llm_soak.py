"""`make soak`, its second half: two language models of one engine under half an hour of everything at once.

    python -m tests.faults.llm_soak [--minutes 30] [--at-once 24]

Random lengths, samplings and priorities; generations that are cancelled, clients that vanish or stop reading,
deadlines, requests that can't be served; the load shifts between the models, whose KV memory is short. Every
request must be answered once; greedy answers must be those of a quiet server, seeded ones must repeat. Afterwards
nothing may run or hold a block, the engine must have found its books right (it refuses requests if not), and
memory, threads and descriptors must be what they were after a tenth of the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import transformers

from enginehouse.testing.server import ServerProcess
from tests.acceptance.llm.small_models import SHAPE, VOCAB, make_reference, save_tokenizer

MODELS = ("llama", "qwen3")
CONTEXT = 1024
PHASE_S = 20.0
"""After so long the other model has most of the load."""
MAX_GROWTH_BYTES = 48 * 2**20
KINDS = {
    "greedy": 30, "seeded": 20, "whole": 10, "v2": 8, "cancelled": 10, "vanishing": 10, "slow reader": 4,
    "deadline": 4, "bad": 4,
}  # fmt: skip
BAD: tuple[dict[str, Any], ...] = (
    {"prompt": ""},
    {"prompt": [VOCAB]},
    {"prompt": [1] * CONTEXT},
    {"temperature": -1},
    {"min_tokens": 9, "max_tokens": 3},
    {"stop": ""},
    {"n": 1000},
)


def make_repository(folder: Path) -> None:
    shape = {**SHAPE, "max_position_embeddings": CONTEXT}
    configs = {"llama": transformers.LlamaConfig(**shape), "qwen3": transformers.Qwen3Config(**shape, head_dim=32)}
    for name, config in configs.items():
        make_reference(config).save_pretrained(folder / name)
        save_tokenizer(folder / name)
        settings = "backend: llm\nserving: {memory: {kv_bytes: 8388608}, llm: {max_num_seqs: 24}}\n"
        (folder / name / "config.yaml").write_text(settings)


class WrongAnswer(Exception):
    pass


@dataclass
class Soak:
    """One run against one server."""

    server: ServerProcess
    rng: random.Random
    session: aiohttp.ClientSession
    kinds: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    _expected: dict[tuple[str, str], str] = field(default_factory=dict)
    """What a request was answered with for the first time, by model and body."""
    _started_s: float = field(default_factory=time.monotonic)

    async def run(self, seconds: float, at_once: int) -> None:
        """Raises WrongAnswer."""
        end_s = time.monotonic() + seconds

        async def worker() -> None:
            while time.monotonic() < end_s:
                await self._one()

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())

    async def learn(self, count: int) -> None:
        """What greedy requests are answered by a server that has nothing else to do."""
        for model in MODELS:
            for number in range(count):
                await self._greedy(model, number)

    async def _one(self) -> None:
        phase = int((time.monotonic() - self._started_s) / PHASE_S)
        model = MODELS[phase % 2] if self.rng.random() < 0.85 else MODELS[1 - phase % 2]
        kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        self.kinds[kind] += 1
        match kind:
            case "greedy":
                await self._greedy(model, self.rng.randrange(NUM_GREEDY))
            case "seeded":
                await self._seeded(model, self.rng.randrange(NUM_GREEDY))
            case "whole":
                await self._whole(model)
            case "v2":
                await self._v2(model)
            case "deadline":
                await self._deadline(model)
            case "bad":
                await self._bad(model)
            case _:
                await self._leave(model, kind)

    # --- kinds

    def _body(self, rng: random.Random, **fields: Any) -> dict[str, Any]:
        prompt = [rng.randrange(VOCAB) for _ in range(int(rng.paretovariate(1.0) * 12) % 700 + 1)]
        shared = [7] * 96 if rng.random() < 0.3 else []
        return {"prompt": shared + prompt, "max_tokens": rng.randint(1, 200), "ignore_eos": True, **fields}

    async def _greedy(self, model: str, number: int) -> None:
        body = self._body(random.Random(f"greedy {number}"), temperature=0)
        await self._same_as_before(model, body)

    async def _seeded(self, model: str, number: int) -> None:
        rng = random.Random(f"seeded {number}")
        body = self._body(rng, temperature=rng.uniform(0.5, 2), top_p=rng.uniform(0.5, 1), seed=number)
        await self._same_as_before(model, body)

    async def _same_as_before(self, model: str, body: dict[str, Any]) -> None:
        text = await self._stream(model, {**body, "priority": self.rng.randrange(3)})
        known = self._expected.setdefault((model, json.dumps(body)), text)
        if text != known:
            raise WrongAnswer(f"{model} answered {body} with {text!r}, and before with {known!r}")

    async def _whole(self, model: str) -> None:
        body = self._body(self.rng, n=self.rng.randint(1, 3), logprobs=self.rng.choice([None, 0, 5]), model=model)
        async with self.session.post(self._url("/v1/completions"), json=body) as answer:
            document = await answer.json()
        if answer.status != 200 or document["usage"]["completion_tokens"] != body["n"] * body["max_tokens"]:
            raise WrongAnswer(f"{body} is answered with {answer.status} {document}")
        self.num_tokens += document["usage"]["completion_tokens"]

    async def _v2(self, model: str) -> None:
        body = {
            "text_input": "x" * self.rng.randint(1, 300), "max_tokens": self.rng.randint(1, 100), "ignore_eos": True,
            "return_num_output_tokens": True,
        }  # fmt: skip
        async with self.session.post(self._url(f"/v2/models/{model}/generate"), json=body) as answer:
            document = await answer.json()
        if answer.status != 200 or document["num_output_tokens"] != body["max_tokens"]:
            raise WrongAnswer(f"{body} is answered with {answer.status} {document}")
        self.num_tokens += document["num_output_tokens"]

    async def _deadline(self, model: str) -> None:
        """Microseconds: some end in time, none without an answer."""
        body = {"text_input": "x" * 200, "max_tokens": 200, "ignore_eos": True}
        body["timeout"] = self.rng.choice([1, 2_000, 50_000])
        async with self.session.post(self._url(f"/v2/models/{model}/generate"), json=body) as answer:
            document = await answer.json()
        if ("text_output" in document) == ("error" in document):
            raise WrongAnswer(f"{body} is answered with {answer.status} {document}")

    async def _bad(self, model: str) -> None:
        body = {"model": model, "prompt": [1], "max_tokens": 5, "stream": self.rng.random() < 0.5}
        body |= self.rng.choice(BAD)
        async with self.session.post(self._url("/v1/completions"), json=body) as answer:
            document = await answer.json()
        if answer.status != 400 or not document["error"]["message"]:
            raise WrongAnswer(f"{body} is answered with {answer.status} {document}")

    async def _leave(self, model: str, kind: str) -> None:
        """Reads a part of a stream. A cancelled one closes its connection, a vanishing one breaks it off, a slow
        reader reads on after a while."""
        body = self._body(self.rng, stream=True, model=model, priority=self.rng.randrange(3))
        async with self.session.post(self._url("/v1/completions"), json=body) as answer:
            read = b"".join([await answer.content.readline() for _ in range(self.rng.randrange(20))])
            if kind == "slow reader":
                await asyncio.sleep(self.rng.random() * 3)
                self._check_end((read + await answer.content.read()).decode(), body)
            elif kind == "vanishing" and answer.connection is not None and answer.connection.transport is not None:
                answer.connection.transport.abort()
            answer.close()

    async def _stream(self, model: str, body: dict[str, Any]) -> str:
        asked = {**body, "model": model, "stream": True}
        async with self.session.post(self._url("/v1/completions"), json=asked) as answer:
            text = await answer.text()
        if answer.status != 200:
            raise WrongAnswer(f"{body} is answered with {answer.status} {text}")
        choices = self._check_end(text, body)
        self.num_tokens += body["max_tokens"]
        return "".join(choice["text"] for choice in choices)

    def _check_end(self, text: str, body: dict[str, Any]) -> list[Any]:
        """The choices of an answer that has one end and no error."""
        events = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
        if not events or events.pop() != "[DONE]" or "[DONE]" in events:
            raise WrongAnswer(f"an answer does not end once: {text[-500:]!r}, asked for {body}")
        choices = [json.loads(event)["choices"][0] for event in events]
        reasons = [choice["finish_reason"] for choice in choices]
        if (reasons[-1:], len(set(reasons[:-1]) - {None})) != (["length"], 0):
            raise WrongAnswer(f"an answer ends with {reasons[-3:]}, asked for {body}")
        return choices

    def _url(self, path: str) -> str:
        return f"http://{self.server.http}{path}"

    # --- what must be left

    async def settle(self) -> None:
        """Waits until the engine is idle and has checked its books. Raises WrongAnswer if it isn't soon."""
        for _ in range(100):
            readings = await self.readings("vllm:num_requests_running", "vllm:num_requests_waiting")
            if not any(readings.values()):
                break
            await asyncio.sleep(0.1)
        else:
            raise WrongAnswer(f"requests are left in the engine: {readings}")
        await asyncio.sleep(3)
        usage = await self.readings("vllm:kv_cache_usage_perc")
        if any(usage.values()):
            raise WrongAnswer(f"blocks are held by nobody: {usage}")
        for model in MODELS:
            await self._greedy(model, 0)  # refused if the books were wrong

    async def readings(self, *names: str) -> dict[str, float]:
        async with self.session.get(self.server.metrics_url) as answer:
            lines = (await answer.text()).splitlines()
        rows = (line.rpartition(" ") for line in lines if line.split("{")[0] in names)
        return {name: float(value) for name, _, value in rows}

    def processes(self) -> list[psutil.Process]:
        root = psutil.Process(self.server.pid)
        return [root, *root.children(recursive=True)]

    def memory_bytes(self) -> int:
        return sum(int(one.memory_full_info().uss) for one in self.processes())

    def num_handles(self) -> int:
        return sum(one.num_fds() + one.num_threads() for one in self.processes())


NUM_GREEDY = 40


async def soak(minutes: float, at_once: int, seed: int, report: Callable[[str], None]) -> None:
    """Raises WrongAnswer if anything of what the module promises does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        make_repository(Path(folder))
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        with ServerProcess([folder]) as server:
            async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
                run = Soak(server, random.Random(seed), session)
                await run.learn(NUM_GREEDY)
                await run.run(minutes * 6, at_once)
                await run.settle()
                memory, handles = run.memory_bytes(), run.num_handles()
                await run.run(minutes * 54, at_once)
                await run.settle()
                grown, more = run.memory_bytes() - memory, run.num_handles() - handles
                counts = await run.readings("vllm:num_preemptions_total", "vllm:prefix_cache_hits_total")
        report(f"{run.kinds.total()} requests in {minutes:g} minutes: {dict(run.kinds)}")
        report(f"{run.num_tokens} tokens checked; {counts}")
        report(f"memory grew by {grown / 2**20:.1f} MiB, descriptors and threads by {more}")
        if grown > MAX_GROWTH_BYTES:
            raise WrongAnswer(f"memory grew by {grown / 2**20:.1f} MiB")
        if more > 8:
            raise WrongAnswer(f"there are {more} descriptors and threads more than before")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.llm_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--at-once", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    try:
        asyncio.run(soak(args.minutes, args.at_once, args.seed, print))
    except* WrongAnswer as problems:
        for problem in problems.exceptions:
            print(f"FAILED: {problem}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
