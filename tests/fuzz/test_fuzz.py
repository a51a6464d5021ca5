"""The fuzzer, for as long as every change can wait. `make fuzz` sends a million."""

from __future__ import annotations

import pytest

from tests.fuzz.run import Plan, fuzz


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--grpc-infer-response-compression-level=high",)], ids=["plain", "packed"])
def test_bad_requests_are_all_answered_and_leave_nothing_behind(flags: tuple[str, ...]) -> None:
    report = fuzz(Plan(num_requests=12_000, seed=20_261_121, flags=flags), say=print)
    assert report.findings == []
    assert report.num_sent >= 12_000
    assert report.answers["http 200"] > 500
    assert report.answers["grpc OK"] > 500
