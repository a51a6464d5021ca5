"""What a run of the fuzzer counted and what it found."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

MAX_FINDINGS = 20
UNEXPECTED = re.compile(rb"unexpected \w+(Error|Exception|Iteration|Interrupt)|Traceback")
"""What the wire's table of errors writes of an exception that no code raised on purpose."""


@dataclass
class Report:
    """`findings` is what no server may do; empty is success."""

    answers: Counter[str] = field(default_factory=Counter)
    """By protocol and status."""
    closed: int = 0
    """Connections that the server closed because it was sent no HTTP."""
    abandoned: int = 0
    """Requests whose client left, or whose bytes never became a whole request."""
    findings: list[str] = field(default_factory=list)

    @property
    def num_sent(self) -> int:
        return sum(self.answers.values()) + self.closed + self.abandoned

    def find(self, what: str, request: bytes, answer: bytes | str = b"") -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(f"{what}\n  sent {request[:600]!r}\n  got {answer[:600]!r}")

    def lines(self) -> list[str]:
        rows = [f"{name:<24} {count:>9}" for name, count in sorted(self.answers.items())]
        return [*rows, f"{'closed by the server':<24} {self.closed:>9}", f"{'abandoned':<24} {self.abandoned:>9}"]
