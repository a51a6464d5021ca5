"""The ceiling: ONNX Runtime called in a loop, with one thread, in a process of its own.

    python -m tests.bench.bare_loop MODEL.onnx WORKLOAD BATCH_SIZE SECONDS

prints rows a second and CPU seconds a row.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.bench.workloads import WORKLOADS, session


def measure(path: Path, workload: str, batch_size: int, duration_s: float) -> dict[str, float]:
    runner = session(path)
    work = WORKLOADS[workload]
    feed = work.batch(batch_size)
    runner.run([work.output], feed)
    start_s, cpu_s, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start_s < duration_s:
        runner.run([work.output], feed)
        count += 1
    elapsed_s = time.perf_counter() - start_s
    rows = count * batch_size
    return {"rows_per_second": rows / elapsed_s, "cpu_s_per_row": (time.process_time() - cpu_s) / rows}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))))
