"""The load client's process: reads one job from stdin as JSON, prints a line when it starts to
count and the result as JSON.

A process of its own, so that its CPU time is not the server's nor the measuring program's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import uvloop

from tests.bench import load_grpc, load_http
from tests.bench.load_result import LoadResult, Tally


async def run(job: dict[str, Any]) -> LoadResult:
    tally = Tally()
    body = Path(job["body"]).read_bytes()
    for _ in range(job["concurrency"]):
        if job["protocol"] == "http":
            await load_http.connect(job["url"], body, job["headers"], tally)
        else:
            await load_grpc.connect(job["address"], job["path"], body, job["num_answer_bytes"], tally)
    await asyncio.sleep(job["warm_up_s"])
    tally.start()
    print("counting", flush=True)
    await asyncio.sleep(job["duration_s"])
    return tally.end()


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(uvloop.run(run(json.load(sys.stdin))))))
