"""The ceiling: ONNX Runtime called in a loop, with one thread, in a process of its own.

    python -m tests.bench.bare_loop MODEL.onnx WORKLOAD BATCH_SIZE SECONDS

prints rows a second, CPU seconds a row, and how many cores others kept busy meanwhile.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.bench.server_process import machine_busy_s
from tests.bench.workloads import WORKLOADS, session


def measure(path: Path, workload: str, batch_size: int, duration_s: float) -> dict[str, float]:
    runner = session(path)
    work = WORKLOADS[workload]
    feed = work.batch(batch_size)
    runner.run([work.output], feed)
    start_s, cpu_s, busy_s, count = time.perf_counter(), time.process_time(), machine_busy_s(), 0
    while time.perf_counter() - start_s < duration_s:
        runner.run([work.output], feed)
        count += 1
    elapsed_s = time.perf_counter() - start_s
    rows, own_s = count * batch_size, time.process_time() - cpu_s
    return {
        "rows_per_second": rows / elapsed_s,
        "cpu_s_per_row": own_s / rows,
        "other_cores": max(0.0, machine_busy_s() - busy_s - own_s) / elapsed_s,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))))
