"""`python -m tests.fuzz --requests=1000000`: bad requests against a real server, over HTTP and gRPC.

Passes if every request was answered, good ones between them rightly, no process ended, nothing was left behind
(sockets, memory, requests in flight), and the log has no traceback. Prints what it counted.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.run import Plan, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--flag", action="append", default=[], help="one more flag of the server")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.requests} requests", flush=True)
    started_s = time.monotonic()
    report = fuzz(Plan(arguments.requests, arguments.seed, tuple(arguments.flag)), say=print)
    print("\n".join(report.lines()))
    print(f"{report.num_sent} requests in {time.monotonic() - started_s:.0f} s, {len(report.findings)} findings")
    print("\n".join(report.findings))
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
